package audit

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// live is one key of each kind and shape.
type live struct {
	name  string // what it is an example of
	kind  string // of the key
	key   string
	value any // its type; nil: raw bytes
}

// allShapes is an honest ledger in which each field of each value is set
// somewhere, and absent somewhere where it may be.
func allShapes(t testing.TB) (*ledger, []live) {
	l := newLedger(t)
	op, a := l.writer(ann), l.writer(nodeA)
	l.meta(op, keyspace.Running)
	l.pool(op, "prod", `{"ranges":[[{"subnet":"10.22.0.0/16"}]]}`)
	l.acquireIn(a, att("a", "c1"), []netip.Prefix{netip.MustParsePrefix("10.22.7.0/26")}, "10.22.7.2")
	l.acquire(a, att("a", "c2"), "10.22.7.3", "fd00::3")
	l.release(a, att("a", "c2")) // without a cooldown
	l.cooldown = 60
	l.acquire(a, att("a", "c3"), "10.22.7.4", "fd00::4")
	l.release(a, att("a", "c3"))
	l.acquire(a, att("a", "c4"), "10.22.7.5", "fd00::5")
	l.pod, l.cooldown = "", 0
	bare := addressIn("10.22.7.6")
	bare.Gateway, bare.Range = netip.Addr{}, netipx.IPRange{}
	l.acquireAt(a, att("a", "c5"), nil, bare)
	for _, n := range []string{"closed", "removed", "recovered"} {
		l.acquire(l.writer("node/"+n), att(n, "c1"), fmt.Sprintf("10.22.8.%d", len(n)))
	}
	l.replace(op, l.writer("node/closed"))
	l.closes(op, l.writer("node/removed"), true)
	l.commit(l.writer("node/recovered"), &entry.Entry{Op: entry.Recover, Epoch: 1})
	l.recovering = true
	l.meta(op, keyspace.Frozen)
	l.put(l.keys.Stop("a"), keyspace.Encode(keyspace.Stop{Node: "a", Found: "revision went back", Time: l.now}))

	addr := func(s string) string { return l.keys.Address("default", netip.MustParseAddr(s)) }
	all := []live{
		{"meta", "meta", l.keys.Meta(), keyspace.Meta{}},
		{"stop", "stops", l.keys.Stop("a"), keyspace.Stop{}},
		{"pool", "pools", l.keys.Pool("prod"), nil},
		{"leased v4", "addresses", addr("10.22.7.5"), keyspace.Address{}},
		{"leased v6", "addresses", addr("fd00::5"), keyspace.Address{}},
		{"free v4", "addresses", addr("10.22.7.3"), keyspace.Address{}},
		{"free v6", "addresses", addr("fd00::3"), keyspace.Address{}},
		{"cooling v4", "addresses", addr("10.22.7.4"), keyspace.Address{}},
		{"cooling v6", "addresses", addr("fd00::4"), keyspace.Address{}},
		{"attachment", "attachments", l.keys.Attachment(att("a", "c4")), keyspace.Attachment{}},
		{"bare attachment", "attachments", l.keys.Attachment(att("a", "c5")), keyspace.Attachment{}},
		{"block", "blocks", l.keys.Block(keyspace.BlockID{Space: "default", Pool: "prod", Prefix: netip.MustParsePrefix("10.22.7.0/26")}), keyspace.Block{}},
	}
	for _, name := range []string{ann, nodeA, "node/closed", "node/removed", "node/recovered"} {
		all = append(all, live{name, "writers", l.keys.Writer(l.writer(name).Writer), keyspace.Writer{}})
	}
	return l, all
}

// uncheckedFields reads the list "Unchecked fields" of the threat model.
func uncheckedFields(t *testing.T) []string {
	b, err := os.ReadFile("../../docs/threat-model.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(b), "\n### Unchecked fields\n")
	if !ok {
		t.Fatal("docs/threat-model.md has no section \"Unchecked fields\"")
	}
	section, _, _ = strings.Cut(section, "\n#")
	var out []string
	for _, line := range regexp.MustCompile(`(?m)^\| ([^|]*) \|`).FindAllStringSubmatch(section, -1) {
		for _, m := range regexp.MustCompile("`([^`]*)`").FindAllStringSubmatch(line[1], -1) {
			out = append(out, m[1])
		}
	}
	if len(out) == 0 {
		t.Fatal("the list of unchecked fields is empty")
	}
	return out
}

// TestEveryField changes each field of each value, and leaves no trace in etcd's
// revisions: verification finds it, or the threat model says that it does not.
func TestEveryField(t *testing.T) {
	l, all := allShapes(t)
	if r := l.verify(Options{AllSignatures: true}); r.ExitCode() != ExitVerified {
		show(t, r)
		t.Fatal("the honest ledger is not verified")
	}
	unchecked, met := uncheckedFields(t), map[string]bool{}
	try := func(of live, name, what string, change func(*Record)) {
		met[name] = true
		old := *l.kv[of.key]
		changed := old
		change(&changed)
		l.kv[of.key] = &changed
		r := l.verify(Options{})
		l.kv[of.key] = &old
		switch listed := slices.Contains(unchecked, name); {
		case !listed && r.FindingCount == 0:
			t.Errorf("%s: %s %s is not found, and the threat model does not say so:\n%s\n%s", of.name, name, what, old.Value, changed.Value)
		case listed && r.FindingCount > 0:
			t.Errorf("%s: %s %s is found, and the threat model says it is not: %v", of.name, name, what, r.Findings)
		}
	}
	for _, of := range all {
		if of.value == nil {
			for i := range l.value(of.key) {
				try(of, of.kind, fmt.Sprintf("at byte %d", i), func(r *Record) { r.Value = bytes.Clone(r.Value); r.Value[i] ^= 1 })
			}
		} else {
			value := reflect.New(reflect.TypeOf(of.value))
			if err := keyspace.Decode(l.value(of.key), value.Interface()); err != nil {
				t.Fatal(err)
			}
			eachField(t, of.kind, value.Elem(), func(name string) {
				b := keyspace.Encode(value.Interface())
				if bytes.Equal(b, l.value(of.key)) {
					t.Fatalf("%s: %s is as it was: %s", of.name, name, b)
				}
				try(of, name, "changed", func(r *Record) { r.Value = b })
			})
		}
		try(of, of.kind+".mod_revision", "set to a newer one", func(r *Record) { r.Mod, l.rev = r.Mod+1, l.rev+1 })
		if of.kind != "stops" {
			try(of, of.kind+", older mod_revision", "", func(r *Record) { r.Mod-- })
		}
		try(of, "create_revision", "changed", func(r *Record) { r.Create-- })
		try(of, "version", "changed", func(r *Record) { r.Version++ })
		try(of, of.kind+", an etcd lease", "", func(r *Record) { r.Lease = 7 })
	}
	for _, name := range unchecked {
		if !met[name] {
			t.Errorf("the threat model lists %s, and there is no such field", name)
		}
	}
	t.Logf("%d fields: %v", len(met), slices.Sorted(maps.Keys(met)))
}

// eachField sets each field of a value to each of some other values, with those
// in it where it holds some, and calls try with the field's name for each.
func eachField(t *testing.T, name string, v reflect.Value, try func(name string)) {
	was := reflect.ValueOf(v.Interface())
	defer v.Set(was)
	set := func(values ...any) {
		for _, x := range values {
			if n := reflect.ValueOf(x).Convert(v.Type()); !reflect.DeepEqual(n.Interface(), was.Interface()) {
				v.Set(n)
				try(name)
			}
		}
		v.Set(was)
	}
	switch x := v.Interface().(type) {
	case keyspace.State:
		set(keyspace.Running, keyspace.Frozen)
	case keyspace.AddressState:
		set(keyspace.Leased, keyspace.Free)
	case entry.Ref:
		other, older := x, x
		other.Hash[0]++
		older.Seq++
		set(other, older, entry.Ref{}, entry.Ref{Chain: entry.ChainID{1}, Seq: 1, Hash: entry.Hash{1}})
	case entry.Hash:
		x[0]++
		set(x, entry.Hash{})
	case entry.ChainID:
		x[0]++
		set(x, entry.ChainID{})
	case time.Time:
		set(x.Add(1), x.Add(-time.Hour), time.Time{})
		if !x.IsZero() {
			set(x.In(time.FixedZone("", 3600)))
		}
	case netip.Addr:
		if x.IsValid() {
			set(x.Next(), netip.Addr{})
		} else {
			set(netip.MustParseAddr("10.22.7.1"), netip.MustParseAddr("fd00::1"))
		}
	case netip.Prefix:
		set(netip.PrefixFrom(x.Addr(), x.Bits()+1), netip.PrefixFrom(x.Addr().Next(), x.Bits()), netip.Prefix{})
	case netipx.IPRange:
		if x.IsValid() {
			set(netipx.IPRangeFrom(x.From(), x.To().Next()), netipx.IPRangeFrom(x.From().Next(), x.To()), netipx.IPRange{})
		} else {
			set(netipx.MustParseIPRange("10.0.0.0-10.255.255.255"))
		}
	default:
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				tag, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
				eachField(t, name+"."+tag, v.Field(i), try)
			}
		case reflect.Pointer:
			if v.IsNil() {
				set(reflect.New(v.Type().Elem()).Interface())
				break
			}
			p := reflect.New(v.Type().Elem()) // not to change what was points to
			p.Elem().Set(v.Elem())
			v.Set(p)
			eachField(t, name, p.Elem(), try)
			set(reflect.Zero(v.Type()).Interface())
		case reflect.Slice:
			set(v.Slice(0, v.Len()-1).Interface(), reflect.Append(v, v.Index(0)).Interface())
			s := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
			reflect.Copy(s, v)
			v.Set(s)
			for i := range s.Len() {
				eachField(t, name, s.Index(i), try)
			}
			if s.Len() > 1 {
				x := reflect.ValueOf(s.Index(0).Interface())
				s.Index(0).Set(s.Index(1))
				s.Index(1).Set(x)
				try(name)
			}
		case reflect.String:
			set(v.String()+"x", "x", "")
		case reflect.Bool:
			set(!v.Bool())
		case reflect.Int, reflect.Int64:
			set(v.Int()+1, 0)
		case reflect.Uint64:
			set(v.Uint()+1, uint64(0))
		default:
			t.Fatalf("%s: this test does not know how to change a %v", name, v.Type())
		}
	}
}

// TestEverySpelling flips a bit in each byte of values, and writes them in other
// ways: what decodes alike is found as well.
func TestEverySpelling(t *testing.T) {
	l, all := allShapes(t)
	boot := regexp.MustCompile(`"boot":"[^"]*"`)
	for _, of := range all {
		if !slices.Contains([]string{"meta", "leased v4", "cooling v6", "attachment", "block", "node/closed"}, of.name) {
			continue
		}
		good := l.value(of.key)
		unchecked := boot.FindIndex(good)
		for i := range good {
			if unchecked != nil && unchecked[0] <= i && i < unchecked[1] {
				continue
			}
			bad := bytes.Clone(good)
			bad[i] ^= []byte{0x20, 1}[i%2] // the other case, another letter
			l.kv[of.key].Value = bad
			if r := l.verify(Options{Workers: 1}); r.FindingCount == 0 {
				t.Errorf("%s: byte %d is not found:\n%s", of.name, i, bad)
			}
		}
		for what, bad := range map[string][]byte{
			"a blank":          append(bytes.Clone(good), ' '),
			"a field twice":    bytes.Replace(good, []byte(`{`), append(append([]byte(`{`), firstField(good)...), ','), 1),
			"another order":    append(append([]byte(`{`), good[1+len(firstField(good))+1:len(good)-1]...), append(append([]byte(`,`), firstField(good)...), '}')...),
			"an escaped digit": regexp.MustCompile(`":"(.)`).ReplaceAllFunc(good, func(b []byte) []byte { return []byte(`":"\u00` + hex.EncodeToString(b[3:])) }),
		} {
			l.kv[of.key].Value = bad
			if r := l.verify(Options{Workers: 1}); r.FindingCount == 0 {
				t.Errorf("%s: %s is not found:\n%s", of.name, what, bad)
			}
		}
		l.kv[of.key].Value = good
	}
}

// firstField is the text of the first field of a JSON object.
func firstField(b []byte) []byte { return regexp.MustCompile(`"[^"]*":("[^"]*"|\d+)`).Find(b) }

// TestDisputed: what no entry says is said.
func TestDisputed(t *testing.T) {
	l := story(t)
	l.setHead(nodeA, func(w *keyspace.Writer) { w.Disputed = "6f9d0a0e" })
	r := l.verify(Options{})
	if r.ExitCode() != ExitVerified || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "two machines write as node/a") {
		show(t, r)
		t.Fatalf("exit %d, notes %q", r.ExitCode(), r.Notes)
	}
}

// TestQuick: honest leases, of both families and free ones too, need no decoding.
func TestQuick(t *testing.T) {
	l, all := allShapes(t)
	r := newReplay(l.keys, l.Snapshot(), &Options{}, newFindings())
	b := &batch{}
	if err := l.yield(true, func(rec Record) error { b.add(int64(b.n), &rec); return nil }); err != nil {
		t.Fatal(err)
	}
	for i := range b.items[:b.n] {
		b.items[i].parseEntry(r.prefix, l.keys, b.buf)
	}
	r.batch(b)
	d := newDiff(r)
	for _, of := range all {
		b := &batch{}
		b.add(0, l.kv[of.key])
		it := &b.items[0]
		it.keyBytes, it.key, it.val = []byte(of.key), of.key, l.value(of.key)
		if want := of.kind == "addresses" || of.kind == "attachments"; d.quick(it) != want {
			t.Errorf("%s is compared the quick way: %v", of.name, !want)
		}
	}
}
