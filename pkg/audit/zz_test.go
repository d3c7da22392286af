package audit

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"
)

func TestZZ(t *testing.T) {
	path := os.Getenv("ZZ")
	if path == "" {
		return
	}
	n, _ := strconv.Atoi(os.Getenv("ZZN"))
	live, _ := strconv.Atoi(os.Getenv("ZZL"))
	if _, err := os.Stat(path); err != nil {
		f, _ := os.Create(path)
		if err := WriteExport(context.Background(), f, busy(t, n, live)); err != nil {
			t.Fatal(err)
		}
		f.Close()
		return
	}
	for range 5 {
		e, err := OpenExport(path)
		if err != nil {
			t.Fatal(err)
		}
		var a, b syscall.Rusage
		syscall.Getrusage(0, &a)
		start := time.Now()
		r, err := Verify(context.Background(), e, Options{})
		if err != nil || r.ExitCode() != 0 {
			t.Fatal(err, r)
		}
		syscall.Getrusage(0, &b)
		d := time.Since(start)
		cpu := time.Duration(b.Utime.Nano() + b.Stime.Nano() - a.Utime.Nano() - a.Stime.Nano())
		fmt.Printf("%d entries %v: %.0f/s, cpu %v, maxrss %d MiB\n", r.Entries, d, float64(r.Entries)/d.Seconds(), cpu, b.Maxrss/1024)
	}
}
