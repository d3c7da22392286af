package audit

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// nonsenses are values that no program of ours would have written.
func nonsenses(good string) map[string]string {
	out := map[string]string{
		"empty": "", "null": "null", "zero": "0", "list": "[]", "object": "{}", "text": `"x"`, "open": "{", "NUL": "\x00", "not UTF-8": "\xff\xfe",
		"escape": "\x1b[2J", "line breaks": "\n\n\n", "a note": "\n— x AAAA\n", "deep": strings.Repeat("[", 100000), "1 MiB": strings.Repeat("a", 1<<20),
		"wrong types":      `{"version":"x","state":[],"leases":7,"node":{},"chain":1,"ranges":"x"}`,
		"a newer version?": "ipam-ledger/entry/v", "a header alone": "ipam-ledger/entry/v1\n",
	}
	if good != "" {
		out["half"] = good[:len(good)/2]
		out["but one byte"] = good[:len(good)-1]
		out["twice"] = good + good
		out["unknown field"] = strings.Replace(good, "{", `{"hostile":1,`, 1) + " "
		out["1 MiB longer"] = good + strings.Repeat(" ", 1<<20)
	}
	return out
}

// witness is harm that has nothing to do with what else is done: an edited entry of
// a node of its own, an address that nobody released, a key that is none.
func witness(t testing.TB) *ledger {
	l := story(t)
	w := l.writer("node/w")
	l.acquire(w, att("w", "w1"), "10.99.0.1")
	l.acquire(w, att("w", "w2"), "10.99.0.2")
	l.edit(l.entryKey("node/w", 1, 2), "u-w1", "u-wX")
	l.edit(l.keys.Attachment(att("w", "w2")), "10.99.0.2", "10.99.0.3")
	l.put(l.keys.Prefix()+"stray", []byte("x"))
	return l
}

var witnessed = []Code{HashMismatch, BadSignature, Rewritten, StateDiffers, UnknownKey}

func witnessOf(r *Report) (n int) {
	for _, f := range r.Findings {
		if strings.Contains(f.Where, "/w/") || f.Where == "stray" {
			n++
		}
	}
	return n
}

// TestHostileRecords: whatever stands at whichever key, verification says so, does
// not fail, and still says all else that is wrong.
func TestHostileRecords(t *testing.T) {
	base := witness(t)
	was := base.verify(Options{AllSignatures: true})
	all, before := witnessOf(was), was.FindingCount
	if all < len(witnessed) {
		t.Fatalf("the witness has %d findings", all)
	}
	var kinds []string
	chosen := map[string]string{} // one key of each kind
	var names []string
	for k := range base.kv {
		names = append(names, k)
	}
	slices.Sort(names)
	for _, k := range names {
		if strings.Contains(k, "/w/") || strings.HasSuffix(k, "/w") || strings.HasSuffix(k, "stray") {
			continue
		}
		key, err := base.keys.Parse(k)
		if err != nil {
			t.Fatal(err)
		}
		kind := key.Kind
		if kind == "addresses" {
			kind = string(get[keyspace.Address](base, k).State) + " address"
		}
		if kind == "chains" {
			switch e := base.parsed(k); {
			case key.Seq == 1:
				kind = "open"
			case base.kv[base.keys.Entry(key.Writer, key.Chain, key.Seq+1)] == nil:
				kind = "last entry"
			default:
				kind = string(e.Op)
			}
		}
		if chosen[kind] == "" {
			chosen[kind] = k
			kinds = append(kinds, kind)
		}
	}
	for _, kind := range kinds {
		for name, bad := range nonsenses(string(base.value(chosen[kind]))) {
			t.Run(kind+"/"+name, func(t *testing.T) {
				l := base.clone(t)
				l.put(chosen[kind], []byte(bad))
				r := l.verify(Options{AllSignatures: true})
				if r.FindingCount <= before {
					t.Errorf("nothing is wrong with %.60q: %v", bad, r.ByCode)
				}
				if got := witnessOf(r); got < all {
					show(t, r)
					t.Errorf("%d of the %d other findings are left", got, all)
				}
				if err := r.Summary(&bytes.Buffer{}); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestHostileKeys: keys that are none are findings, each by itself, and change
// nothing of what else is found.
func TestHostileKeys(t *testing.T) {
	base := witness(t)
	before := base.verify(Options{})
	entry1 := base.entryKey(nodeA, 1, 2)
	for _, key := range []string{
		"\xff", "\x00", "meta/", "meta\x00", "zzz", "addresses/default/4/010.022.007.002x", "addresses/default/4/10.22.7.2", "addresses/default/6/010.022.007.002",
		"addresses/default/6/0000:0000:0000:0000:0000:ffff:0a16:0702", "addresses/default/4/\xff\xfe", "attachments/a/prod/c1", "attachments/a/prod/c1/eth0/x", "attachments/a/prod/c\xff/eth0",
		"attachments/a/prod/c1/\x1b[2J", "attachments/a/prod/../eth0", "attachments/" + strings.Repeat("n/", 2000), "blocks/default/prod/4/010.022.007.001-26",
		"blocks/default/prod/4/010.022.007.000-026", "blocks/default/prod/4/010.022.007.000", "writers/node/a/", "writers/pod/a", "writers/node/\xff", "stops/a/b", "pools/\x1b[2J",
		"chains/", "chains/node/a/", "chains/node/a/zzz", strings.TrimPrefix(entry1, base.keys.Prefix()) + "x", strings.TrimPrefix(entry1, base.keys.Prefix()) + "/", "chainsx",
		strings.Repeat("k", 60000),
	} {
		t.Run(fmt.Sprintf("%.40q", key), func(t *testing.T) {
			l := base.clone(t)
			l.put(l.keys.Prefix()+key, []byte("{}"))
			r := l.verify(Options{})
			if r.FindingCount != before.FindingCount+1 || r.ByCode[UnknownKey] != before.ByCode[UnknownKey]+1 {
				t.Errorf("finds %v, and without it %v", r.ByCode, before.ByCode)
			}
		})
	}
}

// FuzzVerify changes records of an honest ledger in any way: verification comes to
// an end without an error, and says the same for one worker as for four.
func FuzzVerify(f *testing.F) {
	base := story(f)
	var names []string
	for k := range base.kv {
		names = append(names, k)
	}
	slices.Sort(names)
	at := func(key string) uint16 { return uint16(slices.Index(names, key)) }
	for kind, bad := range nonsenses("") {
		if len(bad) < 1000 {
			f.Add(uint16(len(kind)*7), byte(0), []byte(bad), int64(0))
		}
	}
	for i, k := range names {
		f.Add(uint16(i), byte(0), base.kv[names[(i+1)%len(names)]].Value, int64(0))
		f.Add(uint16(i), byte(i%8), base.kv[k].Value, int64(i))
	}
	f.Add(at(base.entryKey(nodeA, 1, 2)), byte(1), []byte("chains/node/a/00000000000000000000000000000000/0000000000000001"), int64(0))
	f.Add(at(base.entryKey(nodeA, 1, 2)), byte(3), []byte(nil), int64(-1))
	f.Fuzz(func(t *testing.T, which uint16, how byte, data []byte, n int64) {
		l := base.clone(t)
		changed := harm(l, names, int(which), how, data, n)
		r, err := Verify(context.Background(), l, Options{AllSignatures: true, Workers: 1})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Summary(&bytes.Buffer{}); err != nil {
			t.Fatal(err)
		}
		again, err := Verify(context.Background(), l, Options{AllSignatures: true, Workers: 4})
		if err != nil || again.FindingCount != r.FindingCount || again.ExitCode() != r.ExitCode() {
			t.Fatalf("%v; finds %v, and with four workers %v", err, r.ByCode, again.ByCode)
		}
		if changed && r.ExitCode() == ExitVerified {
			t.Fatal("nothing is found")
		}
	})
}

// harm does one harmful thing to a record, and reports whether verification must
// find it.
func harm(l *ledger, names []string, which int, how byte, data []byte, n int64) bool {
	key := names[which%len(names)]
	r := l.kv[key]
	old := *r
	isEntry := strings.HasPrefix(key, l.keys.Chains())
	isHead := strings.HasPrefix(key, l.keys.Writers()) // of which not all is checked
	switch how % 8 {
	case 0: // another value, written by a client
		l.put(key, data)
		return !isHead
	case 1: // another key beside it
		other := l.keys.Prefix() + string(data)
		if l.kv[other] != nil {
			return false
		}
		l.put(other, old.Value)
		return !strings.HasPrefix(other, l.keys.Stops()) // a stop is no tampering
	case 2: // bytes changed in place, without a trace in the revisions
		v := bytes.Clone(old.Value)
		for i, b := range data {
			v[(int(uint64(n)%uint64(len(v)))+i)%len(v)] ^= b
		}
		r.Value = v
		return !isHead && !bytes.Equal(v, old.Value)
	case 3: // gone
		l.del(key)
		return true
	case 4:
		r.Mod = n
		return n != old.Mod && (!isHead || n < old.Mod)
	case 5:
		r.Create = n
		return isEntry && n != old.Create
	case 6:
		r.Version = n
		return isEntry && n != old.Version
	default:
		r.Lease = n
		return n != 0
	}
}
