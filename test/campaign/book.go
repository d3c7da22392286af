package main

import (
	"net/netip"
	"sync"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/history"
)

// phase is what a runtime wants of a pod.
type phase int

const (
	adding    phase = iota // ADD has not been answered
	live                   // ADD was answered
	ending                 // DEL is owed
	gone                   // DEL was answered
	forgotten              // no DEL will come: what it has is for a GC to find
)

// pod is one sandbox. Container IDs are never used again.
type pod struct {
	m                    *machine
	container, name, uid string
	who                  int32
	asked                netip.Addr // the address it asks for, if any
	busy                 bool       // somebody is calling for it

	phase phase
	ips   []netip.Addr // as long as it has them
	last  []netip.Addr // what it was told last

	// For the history. begun is its first ADD's call; told when it was answered,
	// with what; seen when it was seen to have that; end and ended are the
	// earliest instant at which it could be released, and the latest.
	begun, end, ended time.Duration
	told              []sighting
	seen              []sighting
}

type sighting struct {
	call, ret time.Duration
	ips       []netip.Addr
}

// book is what runtimes have been told. It is the truth that etcd is compared
// with.
type book struct {
	sync.Mutex
	told   map[netip.Addr]*pod
	pods   map[string]*pod // by container; those of earlier windows only if they live
	serial int32
	freed  []netip.Addr // of late, for pods that ask for an address
}

func newBook() *book { return &book{told: map[netip.Addr]*pod{}, pods: map[string]*pod{}} }

// add begins a pod.
func (b *book) add(m *machine, container, name, uid string) *pod {
	b.Lock()
	defer b.Unlock()
	b.serial++
	p := &pod{m: m, container: container, name: name, uid: uid, who: b.serial, begun: -1, end: -1, ended: history.Never}
	b.pods[container] = p
	return p
}

// tell takes an ADD's answer down. It returns the pod that has the address.
func (b *book) tell(p *pod, r *reply) (other *pod, ip netip.Addr) {
	b.Lock()
	defer b.Unlock()
	p.told = append(p.told, sighting{r.began, r.ended, r.ips})
	if p.m.ends {
		if p.phase = ending; p.end < 0 {
			p.end = r.began
		}
		return nil, ip
	}
	for _, a := range r.ips {
		if o := b.told[a]; o != nil && o != p && other == nil {
			other, ip = o, a
		}
		b.told[a] = p
	}
	p.ips, p.last, p.phase = r.ips, r.ips, live
	return other, ip
}

// kept is after an ADD that was repeated: nothing was released, unless somebody
// ends it all.
func (b *book) kept(p *pod, end time.Duration) {
	b.Lock()
	defer b.Unlock()
	if p.phase == live {
		p.end = end
	}
}

// doubt is before anything is done after which a pod may have lost its addresses.
func (b *book) doubt(p *pod, now time.Duration, to phase) {
	b.Lock()
	defer b.Unlock()
	for _, a := range p.ips {
		if b.told[a] == p {
			delete(b.told, a)
		}
	}
	if len(p.ips) > 0 {
		if b.freed = append(b.freed, p.ips[0]); len(b.freed) > 32 {
			b.freed = b.freed[1:]
		}
	}
	p.ips, p.phase = nil, to
	if p.end < 0 {
		p.end = now
	}
}

// holds is how many pods have addresses, or may have.
func (b *book) holds() (sure, perhaps int) {
	b.Lock()
	defer b.Unlock()
	for _, p := range b.pods {
		switch p.phase {
		case live:
			sure++
		case adding, ending, forgotten:
			perhaps++
		}
	}
	return sure, perhaps
}
