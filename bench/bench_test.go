package main

import (
	"bytes"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

// TestMain lets the test's own program be executed as bench's children.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == childArg {
		os.Exit(child(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// TestQuick runs everything in small: each part measures something, verify
// agrees each time, and nothing is left.
func TestQuick(t *testing.T) {
	dir := t.TempDir()
	var out, progress bytes.Buffer
	if code := run([]string{"-quick", "-dir", dir}, &out, &progress); code != 0 {
		t.Fatalf("exit %d\n%s%s", code, &progress, &out)
	}
	for _, want := range []string{
		"host-local", "ipam-ledger, plaintext", "ipam-ledger, mTLS", "bare txn/s", "export", "etcd ", "per 100,000 ADD+DEL",
		"Targets", "duplicates found: 0",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in the output:\n%s", want, &out)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{"-nosuch"}, {"argument"}} {
		if code := run(args, io.Discard, io.Discard); code != 2 {
			t.Errorf("%v: exit %d, want 2", args, code)
		}
	}
	if code := run([]string{"-only", "nosuch"}, io.Discard, io.Discard); code != 1 {
		t.Errorf("a part that there is not: exit %d, want 1", code)
	}
}

// TestDuplicate: an address that two hold is counted, one that comes back is not.
func TestDuplicate(t *testing.T) {
	s := &subject{name: "test", ips: map[netip.Addr]string{}}
	answer := []byte(`{"cniVersion":"1.0.0","ips":[{"address":"10.22.0.2/22"}]}`)
	for _, step := range []struct {
		id   string
		gone string
		want int
	}{{"a", "", 0}, {"b", "a", 0}, {"c", "", 1}} {
		if step.gone != "" {
			s.release(step.gone)
		}
		if err := s.acquired(step.id, answer); err != nil {
			t.Fatal(err)
		}
		if s.dupl != step.want {
			t.Errorf("after %s: %d duplicates, want %d", step.id, s.dupl, step.want)
		}
	}
}

// TestGenerated: the ledger that verify is measured on is as large as it says
// and has every kind of commit in it.
func TestGenerated(t *testing.T) {
	l, err := newGenLedger(shape{entries: 500, nodes: 3, pods: 70}, "00000000cafebeef")
	if err != nil {
		t.Fatal(err)
	}
	path := t.TempDir() + "/ledger.export"
	if err := writeExport(t.Context(), path, l); err != nil {
		t.Fatal(err)
	}
	x, err := audit.OpenExport(path)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	r, err := audit.Verify(t.Context(), x, audit.Options{AllSignatures: true})
	if err != nil {
		t.Fatal(err)
	}
	if r.ExitCode() != audit.ExitVerified {
		t.Fatalf("exit %d: %v %v", r.ExitCode(), r.Findings, r.Reduced)
	}
	// 210 pods; a node is between a release and an acquire every other commit.
	if r.Entries != 500 || r.Leased < 207 || r.Leased > 210 || r.Chains != 4 || r.Blocks != 6 || r.Free == 0 {
		t.Errorf("%d entries, %d leased, %d free, %d chains, %d blocks", r.Entries, r.Leased, r.Free, r.Chains, r.Blocks)
	}
	ops := map[entry.Op]int{}
	if err := x.Entries(t.Context(), func(rec audit.Record) error {
		e, err := entry.Parse(rec.Value)
		if err == nil {
			ops[e.Op]++
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if ops[entry.Open] != 4 || ops[entry.Meta] != 1 || ops[entry.Acquire]-ops[entry.Release] != int(r.Leased) {
		t.Errorf("entries: %v", ops)
	}
}

func TestNumbers(t *testing.T) {
	for v, want := range map[float64]string{0.1234: "0.12", 12.34: "12.3", 123.4: "123", 1234.4: "1,234", 1234567: "1,234,567"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %s, want %s", v, got, want)
		}
	}
	v := []float64{5, 1, 4, 2, 3}
	if median(v) != 3 || median(v[:4]) != 3 || percentile(v, 0.99) != 5 || percentile(v, 0.5) != 3 {
		t.Errorf("median %v and %v, percentiles %v and %v", median(v), median(v[:4]), percentile(v, 0.99), percentile(v, 0.5))
	}
	if missed := (&target{got: 4, limit: 3.5, atMost: true}); missed.met() {
		t.Error("4 meets at most 3.5")
	}
	if met := (&target{got: 4, limit: 3.5}); !met.met() {
		t.Error("4 does not meet at least 3.5")
	}
}
