package allocator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// scene is a small ledger into which somebody with a plain etcd client writes
// what nobody should: two nodes with pods, a free address, a named pool.
type scene struct {
	*world
	inline  *Pool
	a, b    *machine
	holds   map[keyspace.AttachmentID][]netip.Addr // what runs, by what ADDs answered
	harmed  string                                 // the key that was written
	refused int
}

const goodSpec = `{"ranges":[[{"subnet":"10.33.0.0/27","rangeStart":"10.33.0.1","rangeEnd":"10.33.0.30","gateway":"10.33.0.1"}]]}`

func newScene(t testing.TB) *scene {
	w := newWorld(t, 2)
	w.init(t)
	s := &scene{world: w, inline: mustPool(t, "10.22.0.0/27", "fd00::/120"), a: w.nodes[0], b: w.nodes[1], holds: map[keyspace.AttachmentID][]netip.Addr{}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(w.admin.run(func(w *Writer) error {
		return w.with(context.Background(), func(s *session) error {
			v, err := s.look(false)
			if err != nil {
				return err
			}
			_, err = s.commit(v, change{
				entries: []*entry.Entry{{Op: entry.Pool, Pool: "prod", Spec: sha256.Sum256([]byte(goodSpec))}},
				writes:  func([]entry.Ref) []Write { return []Write{{Key: testKeys.Pool("prod"), Value: []byte(goodSpec)}} },
			})
			return err
		})
	}))
	for _, c := range []string{"gone", "c1", "c2"} {
		must(s.acquire(t, s.a, c, s.inline))
	}
	must(s.acquire(t, s.a, "p1", nil))
	must(s.acquire(t, s.b, "d1", s.inline))
	must(s.release(t, s.a, "gone"))
	w.store.check(t)
	return s
}

// write is a put by a plain client.
func (s *scene) write(key, value string) {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	s.store.apply(Txn{Then: []Write{{Key: key, Value: []byte(value)}}})
}

func (s *scene) value(key string) []byte { return s.store.now().keys[key].value }

// tries is far beyond the commits that a verb needs here: who makes more goes
// round in circles.
const tries = 40

// do runs one verb on a node and checks what holds of every one, whatever
// stands in etcd.
func (s *scene) do(t testing.TB, m *machine, what string, f func(ctx context.Context, w *Writer) error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	sent := 0
	s.step = func(at string) {
		if at == "begun" {
			if sent++; sent > tries {
				cancel()
			}
		}
	}
	err := m.run(func(w *Writer) error { return f(ctx, w) })
	if err != nil {
		s.refused++
		if ctx.Err() != nil || strings.Contains(err.Error(), "gave up") {
			t.Errorf("%s: went round in circles: %v", what, err)
		}
		if errors.Is(err, ErrUnavailable) || errors.Is(err, ErrUnknownOutcome) {
			t.Errorf("%s: the store is blamed for what stands in it: %v", what, err)
		}
		if len(err.Error()) > 4096 {
			t.Errorf("%s: an error of %d bytes: %.200s…", what, len(err.Error()), err)
		}
	}
	return err
}

// acquire is ADD. Whatever it answers must be what was asked for, and nobody else's.
func (s *scene) acquire(t testing.TB, m *machine, container string, pool *Pool) error {
	t.Helper()
	id := m.attachment(container)
	var got *keyspace.Attachment
	err := s.do(t, m, "ADD "+container, func(ctx context.Context, w *Writer) (err error) {
		got, err = w.Acquire(ctx, Request{ID: id, Pool: pool, PoolName: "prod"})
		return err
	})
	if err != nil {
		if got != nil {
			t.Errorf("ADD %s: an error and an answer", container)
		}
		return err
	}
	var ips []netip.Addr
	for _, l := range got.Leases {
		ip := l.Address.Addr()
		if !l.Address.IsValid() || ip.Is4In6() || ip.Zone() != "" || slices.Contains(ips, ip) {
			t.Errorf("ADD %s: answers %v", container, got.Leases)
		}
		ips = append(ips, ip)
	}
	if len(ips) == 0 || pool != nil && len(ips) != len(pool.Sets) {
		t.Errorf("ADD %s: succeeded with %v", container, got.Leases)
	}
	for other, held := range s.holds {
		for _, ip := range ips {
			if other != id && slices.Contains(held, ip) {
				t.Errorf("I1: %v was given to %v, and %v has it", ip, id, other)
			}
		}
	}
	s.holds[id] = ips
	return nil
}

// release is DEL, which succeeds; what could not be released waits in the queue.
func (s *scene) release(t testing.TB, m *machine, container string) error {
	t.Helper()
	id := m.attachment(container)
	if err := s.do(t, m, "DEL "+container, func(ctx context.Context, w *Writer) error { return w.Release(ctx, id, "") }); err != nil {
		return err
	}
	dir, err := statedir.Open(m.dir)
	if err != nil {
		return err
	}
	if _, live := s.store.now().keys[testKeys.Attachment(id)]; live && !dir.IsQueued(id) {
		t.Errorf("DEL %s: its attachment is there, and nothing waits in the queue", container)
	}
	delete(s.holds, id)
	return nil
}

// verbs does everything a runtime does, on both nodes.
func (s *scene) verbs(t testing.TB) {
	t.Helper()
	before := s.store.now()
	same := func(after string, ids ...keyspace.AttachmentID) {
		t.Helper()
		for _, id := range ids {
			key := testKeys.Attachment(id)
			if key != s.harmed && before.keys[key].mod != s.store.now().keys[key].mod {
				t.Errorf("after %s the attachment %v is another or gone", after, id)
			}
		}
	}
	ids := func(m *machine, cc ...string) (out []keyspace.AttachmentID) {
		for _, c := range cc {
			out = append(out, m.attachment(c))
		}
		return out
	}
	_ = s.acquire(t, s.a, "new", s.inline)
	_ = s.acquire(t, s.a, "c1", s.inline)
	_ = s.acquire(t, s.b, "other", s.inline)
	_ = s.acquire(t, s.a, "named", nil)
	_ = s.acquire(t, s.b, "named", nil)
	same("the ADDs", append(ids(s.a, "c1", "c2", "p1"), s.b.attachment("d1"))...)
	_ = s.do(t, s.a, "CHECK c2", func(ctx context.Context, w *Writer) error {
		return w.Check(ctx, s.a.attachment("c2"), s.holds[s.a.attachment("c2")])
	})
	_ = s.do(t, s.a, "STATUS", func(ctx context.Context, w *Writer) error { return w.Probe(ctx) })
	keep := map[keyspace.AttachmentID]bool{}
	for _, id := range ids(s.a, "c1", "c2", "p1") {
		keep[id] = true
	}
	_ = s.do(t, s.a, "GC", func(ctx context.Context, w *Writer) error {
		released, err := w.GC(ctx, "net", keep)
		for _, id := range released {
			if keep[id] || id.Node != s.a.who.Name {
				t.Errorf("GC released %v", id)
			}
			delete(s.holds, id)
		}
		return err
	})
	same("GC", append(ids(s.a, "c1", "c2", "p1"), s.b.attachment("d1"))...)
	for _, c := range []string{"c1", "new", "named"} {
		if err := s.release(t, s.a, c); err != nil {
			t.Errorf("DEL %s: %v", c, err)
		}
	}
	same("DEL", append(ids(s.a, "c2", "p1"), s.b.attachment("d1"))...)
	_ = s.do(t, s.a, "queue flush", func(ctx context.Context, w *Writer) error { _, err := w.Drain(ctx); return err })
	_ = s.acquire(t, s.a, "again", s.inline)
	same("the queue", append(ids(s.a, "c2", "p1"), s.b.attachment("d1"))...)
	if stops := s.store.now().get(Get{Key: testKeys.Stops(), End: keyspace.After(testKeys.Stops())}); len(stops.KVs) > 0 && !strings.HasPrefix(s.harmed, testKeys.Stops()) && !strings.HasPrefix(s.harmed, testKeys.Chains()) {
		t.Errorf("the cluster was stopped: %s", stops.KVs[0].Value)
	}
}

// verify audits the store, which must succeed whatever stands in it.
func (s *scene) verify(t testing.TB) *audit.Report {
	t.Helper()
	r, err := audit.Verify(context.Background(), s.store, audit.Options{AllSignatures: true, Workers: 1})
	if err != nil {
		t.Fatalf("verify: %v", err)
	}
	if err := r.Summary(&bytes.Buffer{}); err != nil {
		t.Fatalf("verify: %v", err)
	}
	return r
}

// places are a key of each kind, one that somebody needs.
func (s *scene) places() map[string]string {
	mark := func(m *machine) *statedir.Mark {
		dir, err := statedir.Open(m.dir)
		if err != nil {
			panic(err)
		}
		mark, err := dir.LoadMark()
		if err != nil {
			panic(err)
		}
		return mark
	}
	a := mark(s.a)
	c1 := s.a.attachment("c1")
	var block string
	for _, kv := range s.store.now().get(Get{Key: testKeys.Blocks("default", "net") + "4/", End: testKeys.Blocks("default", "net") + "5"}).KVs {
		if block == "" {
			block = kv.Key
		}
	}
	return map[string]string{
		"meta":           testKeys.Meta(),
		"pool":           testKeys.Pool("prod"),
		"leased address": testKeys.Address("default", s.holds[c1][0]),
		"free address":   testKeys.Address("default", netip.MustParseAddr("10.22.0.2")),
		"attachment":     testKeys.Attachment(c1),
		"block":          block,
		"writer":         testKeys.Writer(s.a.who),
		"entry":          testKeys.Entry(s.a.who, a.Chain, 3),
		"head entry":     testKeys.Entry(s.a.who, a.Chain, a.Seq),
		"next entry":     testKeys.Entry(s.a.who, a.Chain, a.Seq+1),
		"stop":           testKeys.Stop("n1"),
	}
}

// garbage is values that are none, made of a good one.
func garbage(good []byte) map[string]string {
	text := string(good)
	out := map[string]string{
		"empty": "", "blank": " \n", "null": "null", "zero": "0", "true": "true", "text": `"leased"`, "list": "[]", "object": "{}",
		"open": "{", "NUL": "\x00", "not UTF-8": "\xff\xfe\xff", "deep": strings.Repeat(`{"x":`, 20000), "escape": "\x1b[2J\x1b]0;owned\x07",
		"1 MiB of blanks": strings.Repeat(" ", 1<<20), "1 MiB of text": `"` + strings.Repeat("a", 1<<20) + `"`,
		"wrong types": `{"state":1,"pool":[],"node":{},"leases":"x","space":null,"version":"1","chain":7,"ranges":5}`,
		"huge number": `{"version":1e999,"epoch":123456789012345678901234567890,"seq":-1,"cooldown":1e30}`,
	}
	if len(text) > 2 {
		out["half"] = text[:len(text)/2]
		out["all but one byte"] = text[:len(text)-1]
		out["twice"] = text + text
		out["followed by text"] = text + "x"
		out["unknown field"] = strings.Replace(text, "{", `{"hostile":true,`, 1)
		out["in a list"] = "[" + text + "]"
		out["1 MiB longer"] = text + strings.Repeat("\x00", 1<<20)
	}
	return out
}

// TestHostileValues: whatever somebody puts where a value should be, no address
// is given twice, no pod's lease is ended but the one that was harmed, a DEL
// waits in the queue where it cannot be done, and 'ledger verify' says it.
func TestHostileValues(t *testing.T) {
	base := newScene(t)
	for place, key := range base.places() {
		t.Run(place, func(t *testing.T) {
			for name, bad := range garbage(base.value(key)) {
				t.Run(name, func(t *testing.T) {
					s := base.clone(t)
					s.harmed = key
					s.write(s.harmed, bad)
					if place != "stop" && s.verify(t).ExitCode() != audit.ExitFindings {
						t.Errorf("verify finds nothing wrong with %s", s.harmed)
					}
					s.verbs(t)
					s.verify(t)
				})
			}
		})
	}
}

// A lie is a value that can be read and says what is not so.
type lie struct {
	name string
	do   func(s *scene)
	// The verbs that must fail with err; the others may do either.
	err    error
	fails  func(s *scene, t testing.TB) error
	codes  []audit.Code // verify says at least these
	forged bool         // I1 rests on this very value: whoever may write it may do that
}

func (s *scene) edit(key, from, to string) {
	v := string(s.value(key))
	if !strings.Contains(v, from) {
		panic(fmt.Sprintf("%s has no %q: %s", key, from, v))
	}
	s.harmed = key
	s.write(key, strings.Replace(v, from, to, 1))
}

func addAgain(s *scene, t testing.TB) error { return s.acquire(t, s.a, "c1", s.inline) }
func addNew(s *scene, t testing.TB) error   { return s.acquire(t, s.a, "fresh", s.inline) }
func addNamed(s *scene, t testing.TB) error { return s.acquire(t, s.a, "fresh", nil) }

func spec(text string) func(*scene) {
	return func(s *scene) {
		s.harmed = testKeys.Pool("prod")
		s.write(s.harmed, text)
	}
}

var c1Key = testKeys.Attachment(keyspace.AttachmentID{Node: "n0", Network: "net", Container: "c1", Interface: "eth0"})

var lies = []lie{
	{name: "an attachment without leases", do: func(s *scene) {
		s.edit(c1Key, `"leases":[{"address":"10.22.0.3/27","gateway":"10.22.0.1","range":"10.22.0.1-10.22.0.30"},{"address":"fd00::3/120","gateway":"fd00::1","range":"fd00::1-fd00::ff"}]`, `"leases":[]`)
	}, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an attachment with one address twice", do: func(s *scene) { s.edit(c1Key, "fd00::3/120", "10.22.0.3/27") }, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an attachment with a mapped address", do: func(s *scene) { s.edit(c1Key, "10.22.0.3/27", "::ffff:10.22.0.3/123") }, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an attachment with an empty address", do: func(s *scene) { s.edit(c1Key, "10.22.0.3/27", "") }, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an attachment with another's address", do: func(s *scene) { s.edit(c1Key, "10.22.0.3/27", "10.22.0.4/27") }, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.StateDiffers}},
	{name: "an attachment with an address of nobody", do: func(s *scene) { s.edit(c1Key, "10.22.0.3/27", "10.22.0.30/27") }, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.StateDiffers}},
	{name: "an attachment of a space with slashes", do: func(s *scene) { s.edit(c1Key, `"space":"default"`, `"space":"default/4/010.022.000.009"`) }, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an attachment with a gateway of the other family", do: func(s *scene) { s.edit(c1Key, `"gateway":"10.22.0.1"`, `"gateway":"fe80::1%eth0"`) }, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an attachment held back for ages", do: func(s *scene) { s.edit(c1Key, `"acquire"`, `"cooldown":9223372036854775807,"acquire"`) }, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an attachment with a pod too long to release", do: func(s *scene) {
		s.edit(c1Key, `"acquire"`, `"pod":"`+strings.Repeat("p", entry.MaxPod+1)+`","acquire"`)
	}, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an attachment of 33 addresses", do: func(s *scene) {
		var more []string
		for i := range 33 {
			more = append(more, fmt.Sprintf(`{"address":"10.99.0.%d/24"}`, i))
		}
		s.edit(c1Key, `"leases":[`, `"leases":[`+strings.Join(more, ",")+",")
	}, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an attachment that no entry knows", do: func(s *scene) {
		v := strings.NewReplacer("10.22.0.3", "10.22.0.20", "fd00::3", "fd00::20").Replace(string(s.value(c1Key)))
		s.harmed = strings.Replace(c1Key, "/c1/", "/forged/", 1)
		s.write(s.harmed, v)
	}, err: ErrIntegrity, fails: func(s *scene, t testing.TB) error { return s.acquire(t, s.a, "forged", s.inline) }, codes: []audit.Code{audit.AllocNoEntry}},
	{name: "an address leased to an attachment that is not there", do: func(s *scene) {
		s.edit(testKeys.Address("default", netip.MustParseAddr("10.22.0.3")), `"container":"c1"`, `"container":"nobody"`)
	}, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.StateDiffers}},
	{name: "an address leased by another acquire", do: func(s *scene) {
		s.edit(testKeys.Address("default", netip.MustParseAddr("10.22.0.3")), `"acquire":"`, `"acquire":"00000000000000000000000000000000/7/0000000000000000000000000000000000000000000000000000000000000001","acquire":"`)
	}, codes: []audit.Code{audit.StateDiffers}},
	{name: "an address leased and held back", do: func(s *scene) {
		s.edit(testKeys.Address("default", netip.MustParseAddr("10.22.0.3")), `"state":"leased"`, `"state":"leased","since":"2099-01-01T00:00:00Z"`)
	}, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an address of an unknown state", do: func(s *scene) {
		s.edit(testKeys.Address("default", netip.MustParseAddr("10.22.0.3")), `"state":"leased"`, `"state":"borrowed"`)
	}, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.Malformed}},
	{name: "an address that was never held, leased", do: func(s *scene) {
		s.harmed = testKeys.Address("default", netip.MustParseAddr("10.22.0.4"))
		v := strings.Replace(string(s.value(testKeys.Address("default", netip.MustParseAddr("10.22.0.3")))), `"c1"`, `"nobody"`, 1)
		s.harmed = testKeys.Address("default", netip.MustParseAddr("10.22.0.25"))
		s.write(s.harmed, v)
	}, codes: []audit.Code{audit.AllocNoEntry}},
	{name: "an address freed by hand", do: func(s *scene) {
		s.harmed = testKeys.Address("default", netip.MustParseAddr("10.22.0.3"))
		s.write(s.harmed, string(s.value(testKeys.Address("default", netip.MustParseAddr("10.22.0.2")))))
	}, err: ErrIntegrity, fails: addAgain, codes: []audit.Code{audit.StateDiffers}, forged: true},
	{name: "a block of nobody", do: func(s *scene) { s.edit(s.places()["block"], `"node":"n0"`, `"node":""`) }, codes: []audit.Code{audit.StateDiffers}},
	{name: "a block of somebody else", do: func(s *scene) { s.edit(s.places()["block"], `"node":"n0"`, `"node":"n1"`) }, codes: []audit.Code{audit.StateDiffers}},
	{name: "a block of a node with slashes", do: func(s *scene) { s.edit(s.places()["block"], `"node":"n0"`, `"node":"../n0"`) }, codes: []audit.Code{audit.StateDiffers}},
	{name: "a block as large as all addresses", do: func(s *scene) {
		s.harmed = testKeys.Block(keyspace.BlockID{Space: "default", Pool: "net", Prefix: netip.MustParsePrefix("0.0.0.0/0")})
		s.write(s.harmed, string(s.value(s.places()["block"])))
	}, codes: []audit.Code{audit.AllocNoEntry}},
	{name: "a block as large as all IPv6 addresses", do: func(s *scene) {
		s.harmed = testKeys.Block(keyspace.BlockID{Space: "default", Pool: "net", Prefix: netip.MustParsePrefix("::/0")})
		s.write(s.harmed, string(s.value(s.places()["block"])))
	}, codes: []audit.Code{audit.AllocNoEntry}},
	{name: "a writer of another chain", do: func(s *scene) {
		s.edit(testKeys.Writer(s.a.who), `"chain":"`, `"chain":"00000000000000000000000000000000","chain":"`)
	}, codes: []audit.Code{audit.Malformed}},
	{name: "a writer with the head of another", do: func(s *scene) {
		s.harmed = testKeys.Writer(s.a.who)
		s.write(s.harmed, string(s.value(testKeys.Writer(s.b.who))))
	}, err: ErrIntegrity, fails: addNew, codes: []audit.Code{audit.Missing}},
	{name: "a writer of an enormous seq", do: func(s *scene) { s.edit(testKeys.Writer(s.a.who), `"seq":`, `"seq":18446744073709551615,"seq":1`) }, err: ErrIntegrity, fails: addNew, codes: []audit.Code{audit.Missing}},
	{name: "a writer with a megabyte of machine", do: func(s *scene) {
		s.edit(testKeys.Writer(s.a.who), `"machine":"`, `"machine":"`+strings.Repeat("x", 1<<20))
	}, codes: []audit.Code{audit.StateDiffers}},
	{name: "a writer that another boot wrote", do: func(s *scene) {
		s.edit(testKeys.Writer(s.a.who), `"boot":"`, `"boot":"other-`)
	}, err: ErrIntegrity, fails: addNew},
	{name: "an entry beyond the head", do: func(s *scene) {
		s.harmed = s.places()["next entry"]
		s.write(s.harmed, string(s.value(s.places()["head entry"])))
	}, err: ErrIntegrity, fails: addNew, codes: []audit.Code{audit.HeadRollback}},
	{name: "meta of no cluster", do: func(s *scene) { s.edit(testKeys.Meta(), `"cluster":"`, `"cluster":"","cluster":"`) }, codes: []audit.Code{audit.Malformed}},
	{name: "meta of an unknown state", do: func(s *scene) { s.edit(testKeys.Meta(), `"state":"running"`, `"state":"sleeping"`) }, err: ErrIntegrity, fails: addNew, codes: []audit.Code{audit.StateDiffers}},
	{name: "meta of epoch 0", do: func(s *scene) { s.edit(testKeys.Meta(), `"epoch":1`, `"epoch":0`) }, err: ErrIntegrity, fails: addNew, codes: []audit.Code{audit.StateDiffers}},
	{name: "meta of version 0", do: func(s *scene) { s.edit(testKeys.Meta(), `"version":2`, `"version":0`) }, err: ErrIntegrity, fails: addNew, codes: []audit.Code{audit.Malformed}},
	{name: "meta of a newer version", do: func(s *scene) { s.edit(testKeys.Meta(), `"version":2`, `"version":3`) }, err: ErrIntegrity, fails: addNew},
	{name: "a pool without ranges", do: spec(`{}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool of an empty range set", do: spec(`{"ranges":[[]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool without ends", do: spec(`{"ranges":[[{"subnet":"10.33.0.0/27"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool without subnet", do: spec(`{"ranges":[[{"subnet":"","rangeStart":"10.33.0.1","rangeEnd":"10.33.0.9"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool of IPv6 ends in IPv4", do: spec(`{"ranges":[[{"subnet":"10.33.0.0/27","rangeStart":"fd33::1","rangeEnd":"fd33::9"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool of IPv4 ends in IPv6", do: spec(`{"ranges":[[{"subnet":"fd33::/64","rangeStart":"10.33.0.1","rangeEnd":"10.33.0.9"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool that ends outside of its subnet", do: spec(`{"ranges":[[{"subnet":"10.33.0.0/27","rangeStart":"10.33.0.1","rangeEnd":"10.44.0.9"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool of mapped addresses", do: spec(`{"ranges":[[{"subnet":"::ffff:10.33.0.0/120","rangeStart":"::ffff:10.33.0.1","rangeEnd":"::ffff:10.33.0.9"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool with zones", do: spec(`{"ranges":[[{"subnet":"fe80::/64","rangeStart":"fe80::1%eth0","rangeEnd":"fe80::9%eth0"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool of a gateway of the other family", do: spec(`{"ranges":[[{"subnet":"10.33.0.0/27","rangeStart":"10.33.0.1","rangeEnd":"10.33.0.9","gateway":"fd00::1"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool of both families in one set", do: spec(`{"ranges":[[{"subnet":"10.33.0.0/27","rangeStart":"10.33.0.1","rangeEnd":"10.33.0.9"},{"subnet":"fd33::/64","rangeStart":"fd33::1","rangeEnd":"fd33::9"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool whose sets overlap", do: spec(`{"ranges":[[{"subnet":"10.33.0.0/27","rangeStart":"10.33.0.1","rangeEnd":"10.33.0.9"}],[{"subnet":"10.33.0.0/27","rangeStart":"10.33.0.1","rangeEnd":"10.33.0.9"}]]}`), err: ErrNoPool, fails: addNamed},
	{name: "a pool held back for ages", do: spec(strings.Replace(goodSpec, "{", `{"cooldown":"2562047h",`, 1)), err: ErrNoPool, fails: addNamed},
	{name: "a pool held back by less than nothing", do: spec(strings.Replace(goodSpec, "{", `{"cooldown":"-1h",`, 1)), err: ErrNoPool, fails: addNamed},
	{name: "a pool of a space with slashes", do: spec(strings.Replace(goodSpec, "{", `{"addressSpace":"a/b",`, 1)), err: ErrNoPool, fails: addNamed},
	{name: "a pool of odd blocks", do: spec(strings.Replace(goodSpec, "{", `{"blockSize":-64,`, 1)), err: ErrNoPool, fails: addNamed},
	{name: "a pool that excludes nonsense", do: spec(strings.Replace(goodSpec, "{", `{"exclude":["10.33.0.0/99"],`, 1)), err: ErrNoPool, fails: addNamed},
	{name: "a pool that excludes everything", do: spec(strings.Replace(goodSpec, "{", `{"exclude":["0.0.0.0/0"],`, 1)), err: ErrNoPool, fails: addNamed},
	{name: "a pool of all IPv6 addresses", do: spec(`{"ranges":[[{"subnet":"2000::/3","rangeStart":"2000::1","rangeEnd":"3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}]]}`)},
	{name: "a pool of all addresses", do: spec(`{"ranges":[[{"subnet":"0.0.0.0/0","rangeStart":"0.0.0.0","rangeEnd":"255.255.255.255"}]]}`)},
	{name: "a pool with a megabyte of holes", do: func(s *scene) {
		var b strings.Builder
		b.WriteString(`{"ranges":[[{"subnet":"10.32.0.0/11","rangeStart":"10.32.0.1","rangeEnd":"10.63.255.254"}]],"exclude":["10.32.0.3"`)
		for i := 0; b.Len() < 1<<20; i++ {
			fmt.Fprintf(&b, `,"10.%d.%d.%d"`, 32+i>>15, i>>7&255, 2*i&255)
		}
		spec(b.String() + "]}")(s)
	}},
}

// TestHostileLies: values that can be read and are not so.
func TestHostileLies(t *testing.T) {
	base := newScene(t)
	for _, l := range lies {
		t.Run(l.name, func(t *testing.T) {
			s := base.clone(t)
			l.do(s)
			r := s.verify(t)
			for _, c := range l.codes {
				if r.ByCode[c] == 0 {
					t.Errorf("verify finds %v, want %s among them", r.ByCode, c)
				}
			}
			if l.fails != nil {
				if err := l.fails(s, t); !errors.Is(err, l.err) {
					t.Errorf("got %v, want %v", err, l.err)
				}
			}
			if l.forged {
				return
			}
			s.verbs(t)
			s.verify(t)
		})
	}
}

// TestHostileKeys: keys that nobody has any business to put there, between ours,
// are no reason to refuse anything. Only what is below stops/ stops.
func TestHostileKeys(t *testing.T) {
	p := testKeys.Prefix()
	base := newScene(t)
	for _, key := range []string{
		"\xff", "zzz", "metal", "meta/", "meta\x00", "stops", "stopsx", "pools/", "pools/prod/", "pools/prod\x00", "pools/\xff",
		"addresses/default/4/010.022.000.003x", "addresses/default/4/010.022.000.003/", "addresses/default/4/010.022.000.003\x00",
		"addresses/default/4/010.022.000.0", "addresses/default/4/010.022.000.999", "addresses/default/6/fd00:0000:0000:0000:0000:0000:0000:000G",
		"addresses/default/6/0000:0000:0000:0000:0000:ffff:0a16:0003", "addresses/default/4/fd00::1", "addresses/../4/010.022.000.003",
		"addresses/default/4/010.022.000.00" + strings.Repeat("4", 60000),
		"attachments/n0/net/c1/eth0/", "attachments/n0/net/c1", "attachments/n0/net//eth0", "attachments/n0/net/c1/eth0\x00", "attachments/n0/net/",
		"attachments/n0/net/c1/../c2/eth0", "attachments/n0/net/\xff\xfe/eth0", "attachments/n0/net/c\x1b[2J/eth0", "attachments/n0/net/c1/\xff", "attachments/n0/net/../eth0",
		"attachments/n0/net/" + strings.Repeat("c", entry.MaxContainer+1) + "/eth0", "attachments/n0/net/c1/" + strings.Repeat("e", entry.MaxInterface+1), "attachments/n0/net/c1/eth0 ", "attachments/n0/net/" + strings.Repeat("c", 60000) + "/",
		"blocks/default/net/4/010.022.000.000-26 ", "blocks/default/net/4/010.022.000.000-026", "blocks/default/net/4/010.022.000.001-28", "blocks/default/net/zzz",
		"blocks/default/net/", "blocks/default/net/4/010.022.000.000-99", "writers/node/n0/", "writers/node/\x1b[2J", "writers/pod/n0",
		"chains/node/n0/", "chains/node/n0/zzz", "chains/zzz/n0/00000000000000000000000000000000/0000000000000001", "unknown/" + strings.Repeat("x/", 5000),
	} {
		t.Run(fmt.Sprintf("%.60q", key), func(t *testing.T) {
			s := base.clone(t)
			s.harmed = p + key
			s.write(s.harmed, string(s.value(c1Key)))
			if r := s.verify(t); r.ByCode[audit.UnknownKey] != 1 || r.FindingCount != 1 {
				t.Errorf("verify finds %v, want one %s", r.ByCode, audit.UnknownKey)
			}
			s.verbs(t)
			if s.refused > 0 {
				t.Errorf("%d verbs were refused", s.refused)
			}
		})
	}
}

// TestHostileChainKeys: as TestHostileKeys, for keys in a node's own chain.
func TestHostileChainKeys(t *testing.T) {
	for _, suffix := range []string{"x", "/", "\x00", "\xff"} {
		t.Run(fmt.Sprintf("%q", suffix), func(t *testing.T) {
			s := newScene(t)
			s.harmed = s.places()["head entry"] + suffix
			s.write(s.harmed, "x")
			s.verbs(t)
			if s.refused > 0 {
				t.Errorf("%d verbs were refused", s.refused)
			}
			if r := s.verify(t); r.ByCode[audit.UnknownKey] != 1 {
				t.Errorf("verify finds %v, want one %s", r.ByCode, audit.UnknownKey)
			}
		})
	}
}

// TestHostileQueue: a release that cannot be done keeps no other one waiting.
func TestHostileQueue(t *testing.T) {
	s := newScene(t)
	s.harmed = c1Key
	s.write(s.harmed, "{}")
	if err := s.release(t, s.a, "c1"); err != nil {
		t.Fatal(err)
	}
	dir, err := statedir.Open(s.a.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := dir.Enqueue(statedir.Queued{Attachment: s.a.attachment("c2"), Time: s.clock.Add(time.Second), Reason: "etcd was away"}); err != nil {
		t.Fatal(err)
	}
	if err := s.do(t, s.a, "queue flush", func(ctx context.Context, w *Writer) error { _, err := w.Drain(ctx); return err }); err != nil {
		t.Error(err)
	}
	if dir.IsQueued(s.a.attachment("c2")) || !dir.IsQueued(s.a.attachment("c1")) {
		t.Error("c2 waits behind c1, whose attachment cannot be read")
	}
}

// TestHostilePage: a stray key at the end of a page of addresses is no reason to
// give up, and what comes after it is not taken for free.
func TestHostilePage(t *testing.T) {
	w := newWorld(t, 1)
	dir, err := statedir.Open(w.nodes[0].dir)
	if err != nil {
		t.Fatal(err)
	}
	writer, err := NewWriter(Config{Writer: w.nodes[0].who, Store: w.nodes[0].conn, Dir: dir, Keys: testKeys})
	if err != nil {
		t.Fatal(err)
	}
	s := &session{Writer: writer}
	key := func(last string) string { return testKeys.Addresses() + "default/4/010.022.000." + last }
	part := need{addrs: mustPool(t, "10.22.0.0/24").Sets[0].Spans()}
	k := newKnown()
	if err := s.learn(k, &part, []Range{{KVs: []KV{{Key: key("002")}, {Key: key("003")}, {Key: key("003x")}}, More: true}}); err != nil {
		t.Fatal(err)
	}
	if gap, ok := k.uncovered(part.addrs[0]); !ok || gap.From() != netip.MustParseAddr("10.22.0.4") {
		t.Errorf("unknown from %v on, want 10.22.0.4", gap)
	}
	if err := s.learn(newKnown(), &part, []Range{{KVs: []KV{{Key: key("x")}, {Key: key("y")}}, More: true}}); !errors.Is(err, ErrIntegrity) {
		t.Errorf("got %v, want %v", err, ErrIntegrity)
	}
}

// clone is an independent copy, state directories and all.
func (s *scene) clone(t testing.TB) *scene {
	c := *s
	w := *s.world
	c.world = &w
	w.root = t.TempDir()
	if err := os.CopyFS(w.root, os.DirFS(s.root)); err != nil {
		t.Fatal(err)
	}
	w.store = &memStore{cluster: s.store.cluster, history: slices.Clone(s.store.history[len(s.store.history)-1:])}
	w.nodes = nil
	for _, m := range append([]*machine{s.admin}, s.world.nodes...) {
		n := *m
		n.w, n.dir = &w, filepath.Join(w.root, m.who.Name)
		if err := os.Chmod(filepath.Join(n.dir, "key"), 0o600); err != nil { // CopyFS keeps no modes
			t.Fatal(err)
		}
		n.reconnect()
		if m == s.admin {
			w.admin = &n
			continue
		}
		w.nodes = append(w.nodes, &n)
	}
	c.a, c.b = w.nodes[0], w.nodes[1]
	c.holds = maps.Clone(s.holds)
	return &c
}

// isForged reports whether what was written lets an address be given twice
// whatever the allocator does: an address that is held is said to be free or
// another's, by somebody who may write that.
func (s *scene) isForged(key string, value []byte) bool {
	k, err := testKeys.Parse(key)
	if err != nil || k.Kind != "addresses" {
		return false
	}
	var v keyspace.Address
	return decodeAddress(value, &v) == nil
}

// FuzzStore writes any value to any key below the prefix, then does every verb.
func FuzzStore(f *testing.F) {
	scene := newScene(f)
	// Chains have random names: in the corpus they are called CHAIN.
	head := strings.Split(scene.places()["head entry"], "/")
	chain := head[len(head)-2]
	add := func(key string, value []byte) {
		f.Add(strings.ReplaceAll(strings.TrimPrefix(key, testKeys.Prefix()), chain, "CHAIN"), bytes.ReplaceAll(value, []byte(chain), []byte("CHAIN")))
	}
	for _, key := range scene.places() {
		add(key, scene.value(key))
	}
	for _, l := range lies {
		s := scene.clone(f)
		if l.do(s); len(s.value(s.harmed)) < 1<<16 {
			add(s.harmed, s.value(s.harmed))
		}
	}
	f.Add("attachments/n0/net/c\xff/eth0", scene.value(c1Key))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		key, value = strings.ReplaceAll(key, "CHAIN", chain), bytes.ReplaceAll(value, []byte("CHAIN"), []byte(chain))
		s := scene.clone(t)
		if err := s.acquire(t, s.a, "before", s.inline); err != nil {
			t.Fatal(err)
		}
		s.harmed = testKeys.Prefix() + key
		s.write(s.harmed, string(value))
		if s.isForged(s.harmed, value) {
			return
		}
		s.verify(t)
		s.verbs(t)
		s.verify(t)
	})
}
