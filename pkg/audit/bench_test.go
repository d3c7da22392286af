package audit

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

// busy writes a ledger of n entries by 64 nodes, with so many leases live at the
// end. What is neither a tip nor checked otherwise is signed with nonsense, as
// signing would take longest.
func busy(t testing.TB, n, live int) *ledger {
	l := newLedger(t)
	l.meta(l.writer(ann), "running")
	l.cheap = true
	const nodes = 64
	queue := make([][]string, nodes)
	free := make([]string, 0, live+nodes)
	for i := 2; i < live+nodes+2; i++ {
		free = append(free, netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String())
	}
	container := func(i int) string {
		return fmt.Sprintf("%064x", uint64(i)*0x9e3779b97f4a7c15)
	}
	byContainer := map[string]string{}
	total := 0
	for i := 0; total < n; i++ {
		name := "n" + strconv.Itoa(i%nodes)
		w := l.writer("node/" + name)
		if len(queue[i%nodes])*nodes >= live {
			c := queue[i%nodes][0]
			queue[i%nodes] = queue[i%nodes][1:]
			l.release(w, att(name, c))
			free = append(free, byContainer[c])
			delete(byContainer, c)
			total++
		}
		c := container(i)
		ip := free[0]
		free = free[1:]
		l.acquire(w, att(name, c), ip)
		byContainer[c] = ip
		queue[i%nodes] = append(queue[i%nodes], c)
		total++
	}
	l.cheap = false
	for i := range nodes { // tips whose signatures hold
		w := l.writer("node/n" + strconv.Itoa(i))
		l.commit(w, &entry.Entry{Op: entry.Recover, Epoch: 1})
	}
	return l
}

// benchEntries is how many entries are verified; IPAM_LEDGER_BENCH_ENTRIES sets it.
func benchEntries() int {
	if n, err := strconv.Atoi(os.Getenv("IPAM_LEDGER_BENCH_ENTRIES")); err == nil {
		return n
	}
	return 100_000
}

func BenchmarkVerifyExport(b *testing.B) {
	for _, live := range []int{3_000, 100_000} {
		n := benchEntries()
		b.Run(fmt.Sprintf("entries=%d/live=%d", n, min(live, n/2)), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "export")
			f, err := os.Create(path)
			if err != nil {
				b.Fatal(err)
			}
			if err := WriteExport(context.Background(), f, busy(b, n, min(live, n/2))); err != nil {
				b.Fatal(err)
			}
			if err := f.Close(); err != nil {
				b.Fatal(err)
			}
			runtime.GC()
			b.ReportAllocs()
			for b.Loop() {
				e, err := OpenExport(path)
				if err != nil {
					b.Fatal(err)
				}
				start := time.Now()
				r, err := Verify(context.Background(), e, Options{})
				if err != nil {
					b.Fatal(err)
				}
				if r.ExitCode() != 0 {
					r.Summary(os.Stderr)
					b.Fatal("not verified")
				}
				b.ReportMetric(float64(r.Entries)/time.Since(start).Seconds(), "entries/s")
				e.Close()
			}
		})
	}
}
