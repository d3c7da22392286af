package etcdcluster

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// network is all links of a cluster. A link has a direction: links[from][to],
// where the last index stands for clients.
type network struct {
	mu      sync.Mutex
	links   [][]link
	changed chan struct{} // closed, and made anew, with every change
}

// link is what becomes of bytes on their way.
type link struct {
	cut   bool
	delay time.Duration
}

func newNetwork(members int) *network {
	n := &network{links: make([][]link, members+1), changed: make(chan struct{})}
	for i := range n.links {
		n.links[i] = make([]link, members+1)
	}
	return n
}

// change changes links and wakes up who waits for that.
func (n *network) change(f func(links [][]link)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(n.links)
	close(n.changed)
	n.changed = make(chan struct{})
}

func (n *network) delay(from, to int) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.links[from][to].delay
}

// passable waits until the link is not cut.
func (n *network) passable(ctx context.Context, from, to int) error {
	for {
		n.mu.Lock()
		cut, changed := n.links[from][to].cut, n.changed
		n.mu.Unlock()
		if !cut {
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// forwarder listens in front of a member.
type forwarder struct {
	net.Listener
	n      *network
	to     string             // the member's own address
	index  int                // of the member
	source func(net.Conn) int // who is calling; -1 where that cannot be told
	ctx    context.Context    // ends with the forwarder
	end    context.CancelFunc
	wg     sync.WaitGroup // of connections
}

func forward(n *network, index int, to string, source func(net.Conn) int) (*forwarder, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("a forwarder for member %d: %w", index, err)
	}
	f := &forwarder{Listener: l, n: n, to: to, index: index, source: source}
	f.ctx, f.end = context.WithCancel(context.Background())
	f.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			f.wg.Go(func() { f.pass(conn) })
		}
	})
	return f, nil
}

func (f *forwarder) close() {
	f.Close()
	f.end()
	f.wg.Wait()
}

func (f *forwarder) pass(caller net.Conn) {
	defer caller.Close()
	if t, ok := caller.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // a member that is down resets
	}
	from := f.source(caller)
	if from < 0 {
		return
	}
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	if f.n.passable(ctx, from, f.index) != nil {
		return
	}
	member, err := net.Dial("tcp", f.to)
	if err != nil {
		return
	}
	defer member.Close()
	stop := context.AfterFunc(ctx, func() { caller.Close(); member.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { f.n.stream(ctx, cancel, member, caller, from, f.index) })
	wg.Go(func() { f.n.stream(ctx, cancel, caller, member, f.index, from) })
	wg.Wait()
}

// piece is some bytes and when they are due.
type piece struct {
	b   []byte
	due time.Time
}

// stream passes what flows one way, and ends the connection with itself.
func (n *network) stream(ctx context.Context, end context.CancelFunc, dst, src net.Conn, from, to int) {
	// Little is under way at once: a slow link is felt by its sender.
	pieces := make(chan piece, 16)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()
	wg.Go(func() {
		defer close(pieces)
		for {
			b := make([]byte, 32<<10)
			k, err := src.Read(b)
			if k > 0 {
				select {
				case pieces <- piece{b[:k], time.Now().Add(n.delay(from, to))}:
				case <-ctx.Done():
					return
				}
			}
			if err != nil {
				return
			}
		}
	})
	for p := range pieces {
		if wait := time.Until(p.due); wait > 0 {
			t := time.NewTimer(wait)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return
			}
		}
		if n.passable(ctx, from, to) != nil {
			return
		}
		if _, err := dst.Write(p.b); err != nil {
			return
		}
	}
}

// inode is that of the socket at the other end of a connection of this machine,
// "" where it is gone.
func inode(conn net.Conn) string {
	want := endpoint(conn.RemoteAddr()) + " " + endpoint(conn.LocalAddr())
	f, err := os.Open("/proc/self/net/tcp")
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) > 9 && fields[1]+" "+fields[2] == want {
			return fields[9]
		}
	}
	return ""
}

// endpoint is an address as /proc spells it.
func endpoint(a net.Addr) string {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil || !ap.Addr().Unmap().Is4() {
		return ""
	}
	ip := ap.Addr().Unmap().As4()
	return fmt.Sprintf("%02X%02X%02X%02X:%04X", ip[3], ip[2], ip[1], ip[0], ap.Port())
}

// has reports whether a process has a socket.
func has(pid int, inode string) bool {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	d, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	want := "socket:[" + inode + "]"
	for _, name := range names {
		if link, err := os.Readlink(dir + "/" + name); err == nil && link == want {
			return true
		}
	}
	return false
}
