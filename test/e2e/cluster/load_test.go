package cluster

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// load is what runtimes do all the time: on each node some of them add and
// delete pods, at random, and believe what they are told.
type load struct {
	*world
	nodes         []*node
	workers, pods int // of each node; of each worker, at most
	rnd           *rand.Rand
	// may says whether an ADD may be refused so. nil: never.
	may func(failure) bool
	// kill says after how long a call is killed; nil or 0: it is not.
	kill func(own *rand.Rand, verb string) time.Duration

	over    atomic.Bool
	running sync.WaitGroup
	mu      sync.Mutex
	calls   []call
	live    map[string]string // address: who was told so and has it
	left    [][]string        // pods, by worker
}

// call is one that ended.
type call struct {
	verb         string
	began, ended time.Time
	code         int // 0: success
	killed       bool
	text         string
}

// start begins; the test ends it by end.
func (w *world) load(nodes []*node, change ...func(*load)) *load {
	w.t.Helper()
	l := &load{world: w, nodes: nodes, workers: 2, pods: 8, rnd: random(w.t), live: map[string]string{}}
	for _, f := range change {
		f(l)
	}
	l.left = make([][]string, len(nodes)*l.workers)
	for i, n := range nodes {
		for j := range l.workers {
			own := rand.New(rand.NewPCG(l.rnd.Uint64(), 0))
			l.running.Go(func() { l.work(n, own, i*l.workers+j) })
		}
	}
	w.t.Cleanup(func() {
		l.over.Store(true)
		l.running.Wait()
	})
	return l
}

func (l *load) work(n *node, own *rand.Rand, index int) {
	t := l.t
	type pod struct {
		name string
		ips  []string // nil: not told
	}
	var have []*pod
	defer func() {
		for _, p := range have {
			l.left[index] = append(l.left[index], p.name)
		}
	}()
	for serial := 0; !l.over.Load() && !t.Failed(); serial++ {
		p := &pod{name: fmt.Sprintf("w%d-%d", index, serial)}
		verb, at := "ADD", -1
		if x := own.IntN(10); len(have) > 0 && (x < 5 || len(have) >= l.pods) {
			at = own.IntN(len(have))
			p = have[at]
			if x > 0 {
				verb = "DEL"
			}
		} else {
			have = append(have, p)
		}
		who := n.name + "/" + p.name
		forget := func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			for _, ip := range p.ips {
				delete(l.live, ip)
			}
			p.ips = nil
		}
		if verb == "DEL" {
			forget()
		}
		var after time.Duration
		if l.kill != nil {
			after = l.kill(own, verb)
		}
		r := n.call(verb, p.name, after)
		c := call{verb: verb, began: r.began, ended: r.began.Add(r.took), killed: r.killed}
		switch {
		case r.killed:
		case r.exit != 0:
			f := r.failure()
			c.code, c.text = f.Code, f.text()
			if c.code == 0 {
				c.code = -1
			}
			if verb == "DEL" || l.may == nil || !l.may(f) {
				t.Errorf("%s %s failed after %v with code %d: %s", verb, who, r.took, c.code, c.text)
			}
			// An ADD that fails, a repeated one too, may end the lease: the
			// runtime owes it a DEL.
			forget()
		case verb == "DEL":
			have = slices.DeleteFunc(have, func(x *pod) bool { return x == p })
		default:
			ips, err := r.ips()
			if err != nil {
				t.Errorf("ADD %s: %v\n%s", who, err, r.stdout)
				break
			}
			if p.ips != nil && !slices.Equal(p.ips, ips) {
				t.Errorf("%s was told %v, and then %v", who, p.ips, ips)
			}
			p.ips = ips
			l.mu.Lock()
			for _, ip := range ips {
				if other := l.live[ip]; other != "" && other != who {
					t.Errorf("%s was told to %s while %s has it", ip, who, other)
				}
				l.live[ip] = who
			}
			l.mu.Unlock()
		}
		l.mu.Lock()
		l.calls = append(l.calls, c)
		l.mu.Unlock()
	}
}

// more waits until some ADDs that began from now on have succeeded, so that what
// comes next meets a load that flows.
func (l *load) more(adds int) {
	l.t.Helper()
	l.after(time.Now(), adds)
}

// after waits until some ADDs that began after a time have succeeded.
func (l *load) after(began time.Time, adds int) {
	l.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		n := 0
		l.mu.Lock()
		for i := len(l.calls) - 1; i >= 0 && l.calls[i].ended.After(began); i-- {
			if c := &l.calls[i]; c.verb == "ADD" && c.code == 0 && !c.killed && c.began.After(began) {
				n++
			}
		}
		l.mu.Unlock()
		if n >= adds || l.t.Failed() {
			return
		}
		if time.Now().After(end) {
			l.t.Fatalf("%d ADDs succeeded in a minute, want %d", n, adds)
		}
	}
}

// endedSince waits until some calls that began after a time have ended, in
// whichever way.
func (l *load) endedSince(began time.Time, calls int) {
	l.t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		n := 0
		l.mu.Lock()
		for i := len(l.calls) - 1; i >= 0 && l.calls[i].ended.After(began); i-- {
			if l.calls[i].began.After(began) {
				n++
			}
		}
		l.mu.Unlock()
		if n >= calls || l.t.Failed() {
			return
		}
		if time.Now().After(end) {
			l.t.Fatalf("%d calls ended in two minutes, want %d", n, calls)
		}
	}
}

// gap is the longest time without an ADD that succeeded, of those times that end
// after from.
func (l *load) gap(from time.Time) (longest time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var last time.Time
	var done []time.Time
	for _, c := range l.calls {
		if c.verb == "ADD" && c.code == 0 && !c.killed {
			done = append(done, c.ended)
		}
	}
	slices.SortFunc(done, time.Time.Compare)
	for _, at := range done {
		if !last.IsZero() && at.After(from) {
			longest = max(longest, at.Sub(last))
		}
		last = at
	}
	return longest
}

// worst is the longest that a call with a verb took, of those that ended after
// from, and how many there were.
func (l *load) worst(verb string, from time.Time) (longest time.Duration, calls int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.calls {
		if c.verb == verb && !c.killed && c.ended.After(from) {
			longest = max(longest, c.ended.Sub(c.began))
			calls++
		}
	}
	return longest, calls
}

var digits = regexp.MustCompile(`[0-9a-f]{6,}|w?[0-9]+(\.[0-9]+)?(µs|ms|s)?`)

// end ends the load, and checks that nothing is lost: the ledger verifies, pods
// have what they were told, DEL of every pod frees everything, and nothing stays
// behind.
func (l *load) end() {
	t := l.t
	t.Helper()
	l.over.Store(true)
	l.running.Wait()
	if t.Failed() {
		return
	}
	l.verify()
	leased := l.leased()
	for ip, who := range l.live {
		if leased[ip] != who {
			t.Errorf("%s was told to %s, and etcd says %q", ip, who, leased[ip])
		}
	}
	var wg sync.WaitGroup
	for i, pods := range l.left {
		wg.Go(func() {
			for _, p := range pods {
				if r := l.nodes[i/l.workers].call("DEL", p, 0); r.exit != 0 {
					t.Errorf("DEL %s: %s%s", p, r.stdout, r.stderr)
				}
			}
		})
	}
	wg.Wait()
	for _, n := range l.nodes {
		if r := n.ledger("queue", "flush"); r.exit != 0 {
			t.Errorf("ledger queue flush on %s: %s%s", n.name, r.stdout, r.stderr)
		}
		for _, sub := range []string{"queue", "holdings"} {
			if k := n.files(sub); k > 0 {
				t.Errorf("%s: %d files are left in %s", n.name, k, sub)
			}
		}
	}
	if left := l.leased(); len(left) > 0 {
		t.Errorf("addresses are leased though every pod is gone: %v", left)
	}
	l.report()
}

// report logs what was done, and each kind of refusal once.
func (l *load) report() {
	l.t.Helper()
	kinds := map[string]int{}
	first := map[string]string{}
	count := map[string]int{}
	for _, c := range l.calls {
		switch {
		case c.killed:
			count["killed"]++
		case c.code != 0:
			count["refused"]++
			kind := digits.ReplaceAllString(c.text, "#")
			if kinds[kind]++; kinds[kind] == 1 {
				first[kind] = c.text
			}
		default:
			count[c.verb]++
		}
	}
	l.t.Logf("%d ADDs and %d DELs succeeded, %d ADDs were refused, %d calls were killed", count["ADD"], count["DEL"], count["refused"], count["killed"])
	var names []string
	for kind := range kinds {
		names = append(names, kind)
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(kinds[b], kinds[a]), strings.Compare(a, b)) })
	for _, kind := range names[:min(len(names), 12)] {
		l.t.Logf("%d times: %s", kinds[kind], first[kind])
	}
}

// spread are the least, middle and greatest of some times.
func spread(times []time.Duration) string {
	s := slices.Sorted(slices.Values(times))
	ms := func(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
	return fmt.Sprintf("%d times: min %v, median %v, max %v", len(s), ms(s[0]), ms(s[len(s)/2]), ms(s[len(s)-1]))
}

// tryAgain is a refusal because etcd is not there for the moment, that names it.
func tryAgain(f failure) bool {
	return f.Code == codeTryAgain && strings.Contains(f.Details, "http") && !strings.Contains(f.text(), "context canceled")
}
