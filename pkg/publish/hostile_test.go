package publish

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// FuzzModel puts any value at any key of a small ledger, and deletes it: the
// model never fails, what it shows can be sent, and nothing of it stays behind.
func FuzzModel(f *testing.F) {
	keys, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		f.Fatal(err)
	}
	ref := entry.Ref{Seq: 1, Hash: entry.Hash{1}}.String()
	good := [][2]string{
		{"meta", `{"version":1,"cluster":"c","etcdCluster":"00000000000000c1","epoch":1,"state":"running","entry":"` + ref + `"}`},
		{"pools/prod", `{"ranges":[[{"subnet":"10.33.0.0/27","rangeStart":"10.33.0.1","rangeEnd":"10.33.0.30","gateway":"10.33.0.1"}]]}`},
		{"addresses/default/4/010.022.000.002", `{"state":"leased","pool":"net","holder":{"node":"a","network":"net","container":"c1","interface":"eth0"},"acquire":"` + ref + `"}`},
		{"addresses/default/4/010.022.000.003", `{"state":"free","pool":"net","release":"` + ref + `","heldUntil":"2026-11-20T15:00:00Z"}`},
		{"addresses/default/6/fd00:0000:0000:0000:0000:0000:0000:0002", `{"state":"leased","pool":"net","holder":{"node":"a","network":"net","container":"c1","interface":"eth0"},"acquire":"` + ref + `"}`},
		{"attachments/a/net/c1/eth0", `{"space":"default","pool":"net","leases":[{"address":"10.22.0.2/24","gateway":"10.22.0.1"},{"address":"fd00::2/64"}],"acquire":"` + ref + `"}`},
		{"blocks/default/net/4/010.022.000.000-28", `{"node":"a","claim":"` + ref + `"}`},
		{"blocks/default/prod/4/010.033.000.000-29", `{"node":"a","claim":"` + ref + `"}`},
		{"writers/node/a", `{"chain":"00000000000000000000000000000000","seq":1,"hash":"` + (entry.Hash{1}).String() + `","key":"","machine":"m","epoch":1}`},
	}
	for _, g := range good {
		f.Add(g[0], []byte(g[1]), g[0], []byte("{}"))
		f.Add(g[0], []byte(g[1][:len(g[1])/2]), "stops/a", []byte("null"))
		f.Add(g[0], []byte("null"), g[0], []byte("\xff"))
	}
	f.Add("blocks/default/net/6/0000:0000:0000:0000:0000:0000:0000:0000-0", []byte(`{"node":"a","claim":"`+ref+`"}`), "blocks/default/net/4/000.000.000.000-0", []byte(`{"node":"b","claim":"`+ref+`"}`))
	f.Add("attachments/a/net/c2/eth0", []byte(`{"space":"default","pool":"net","leases":[{"address":"::ffff:1.2.3.4/1"},{"address":""}],"acquire":"`+ref+`"}`), "pools/net", []byte(`{"ranges":[[{"subnet":"::/0","rangeStart":"::","rangeEnd":"ffff::"}]]}`))
	f.Add("addresses/default/4/010.022.000.004", []byte(`{"state":"free","pool":"net","release":"`+ref+`","heldUntil":"9999-12-31T23:59:59Z"}`), "meta", []byte(`{}`))
	now := time.Date(2026, 11, 20, 14, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, key1 string, value1 []byte, key2 string, value2 []byte) {
		m := NewModel(keys)
		put := func(key string, value []byte) {
			if value == nil {
				value = []byte{}
			}
			m.Put(audit.Record{Key: keys.Prefix() + key, Value: value, Create: 7, Mod: 7, Version: 1}, now)
		}
		shown := func() *state.State {
			var s state.State
			m.Fill(&s, now)
			for i := range s.Pools {
				s.Pools[i].Trend = 0
			}
			for _, p := range s.Pools {
				if p.Leased > 1000 || p.Held > 1000 {
					t.Fatalf("%+v of a handful of addresses", p)
				}
			}
			if s.Near < 0 || s.Near > s.Nodes {
				t.Fatalf("%d of %d nodes", s.Near, s.Nodes)
			}
			if _, err := json.Marshal(&s); err != nil {
				t.Fatal(err)
			}
			return &s
		}
		for _, g := range good {
			put(g[0], []byte(g[1]))
		}
		m.Loaded(now, nil)
		before := shown()
		put(key1, value1)
		put(key2, value2)
		shown()
		for _, key := range []string{key1, key2} {
			m.Delete(keys.Prefix()+key, now)
			for _, g := range good {
				if g[0] == key {
					put(g[0], []byte(g[1]))
				}
			}
		}
		if after := shown(); !reflect.DeepEqual(before, after) {
			t.Fatalf("before:\n%+v\nafter:\n%+v", before, after)
		}

		c := newChecker(keys, nil)
		for _, g := range good {
			c.load(audit.Record{Key: keys.Prefix() + g[0], Value: []byte(g[1])})
		}
		events := []Event{
			{Record: audit.Record{Key: keys.Prefix() + key1, Value: value1, Create: 8, Mod: 8, Version: 1}},
			{Record: audit.Record{Key: keys.Prefix() + key2, Value: value2, Create: 7, Mod: 8, Version: 2}},
			{Record: audit.Record{Key: keys.Prefix() + key1, Mod: 9}, Deleted: true},
		}
		c.revision(events)
		c.load(audit.Record{Key: keys.Prefix() + key1, Value: bytes.Clone(value1)})
		c.revision(events)
	})
}
