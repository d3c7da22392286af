package audit

import "testing"

func TestHonest(t *testing.T) {
	for _, all := range []bool{false, true} {
		r := story(t).verify(Options{AllSignatures: all})
		if r.ExitCode() != 0 || len(r.Warnings) > 0 || len(r.Notes) > 0 {
			show(t, r)
			t.Fatalf("exit %d", r.ExitCode())
		}
		show(t, r)
	}
}
