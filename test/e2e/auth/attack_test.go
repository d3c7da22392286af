package auth

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// TestAttack: every role, every class of keys, put, delete and read of one key
// and of a range, in a transaction's branches and its comparisons, by a client
// that talks to etcd itself. The table was written by hand, not taken from the
// roles: it is what docs/access.md says.
func TestAttack(t *testing.T) {
	t.Parallel()
	c := start(t, "a")
	c.spoilt = true
	c.ledger("root", "auth", "apply", "--yes", "--sealer", "main").ok()
	who := []string{"node:a", "operator:alice", "auditor:carol", "sealer:main", "nobody"}
	clients := map[string]*clientv3.Client{}
	for _, w := range who {
		clients[w] = c.client(w)
	}
	const (
		p     = "/ipam-ledger/v1/"
		chain = "/00000000000000000000000000000001/"
		seq   = "0000000000000001"
	)
	for _, row := range []struct {
		key, end string
		may      string // r, w or - of node a, operator alice, auditor, sealer; a stranger may nothing
	}{
		{p + "meta", "", "r w r r"},
		{p + "stops/a", "", "w w r r"},
		{p + "stops/b", "", "r w r r"},
		{p + "stops/", p + "stops0", "r w r r"},
		{p + "pools/prod", "", "r w r r"},
		{p + "pools/", p + "pools0", "r w r r"},
		{p + "addresses/default/4/010.022.000.007", "", "w w r r"},
		{p + "addresses/", p + "addresses0", "w w r r"},
		{p + "blocks/default/net/4/010.022.000.000-28", "", "w w r r"},
		{p + "blocks/", p + "blocks0", "w w r r"},
		{p + "attachments/a/net/c/eth0", "", "w w r r"},
		{p + "attachments/a/", p + "attachments/a0", "w w r r"},
		{p + "attachments/b/net/c/eth0", "", "- w r r"},
		{p + "attachments/ab/net/c/eth0", "", "- w r r"}, // whose name begins with a's
		{p + "attachments/a/", p + "attachments/b0", "- w r r"},
		{p + "attachments/", p + "attachments0", "- w r r"},
		{p + "writers/node/a", "", "w w r r"},
		{p + "writers/node/ab", "", "- w r r"},
		{p + "writers/node/b", "", "- w r r"},
		{p + "writers/node/a", p + "writers/node/b", "- w r r"},
		{p + "writers/operator/alice", "", "- w r r"},
		{p + "writers/operator/bob", "", "- w r r"},
		{p + "writers/sealer/main", "", "- r r w"},
		{p + "writers/", p + "writers0", "- r r r"},
		{p + "chains/node/a" + chain + seq, "", "w r r w"},
		{p + "chains/node/a/", p + "chains/node/a0", "w r r w"},
		{p + "chains/node/ab" + chain + seq, "", "- r r w"},
		{p + "chains/node/b" + chain + seq, "", "- r r w"},
		{p + "chains/node/a/", p + "chains/node/b0", "- r r w"},
		{p + "chains/operator/alice" + chain + seq, "", "- w r w"},
		{p + "chains/operator/bob" + chain + seq, "", "- r r w"},
		{p + "chains/sealer/main" + chain + seq, "", "- r r w"},
		{p + "chains/", p + "chains0", "- r r w"},
		{p + "nothing-we-know", "", "- r r r"},
		{p, p[:len(p)-1] + "0", "- r r r"},
		{"/ipam-ledger/v10/meta", "", "- - - -"}, // another ledger
		{"/ipam-ledger/", "/ipam-ledger0", "- - - -"},
		{"/registry/secrets/default/x", "", "- - - -"},
		{"\x00", "\x00", "- - - -"},
	} {
		may := strings.Fields(row.may + " -")
		for i, w := range who {
			c.attack(w, clients[w], row.key, row.end, may[i] != "-", may[i] == "w")
		}
	}

	// What is not about keys: nobody but root administers.
	for _, w := range who {
		k := clients[w]
		for name, f := range map[string]func(ctx context.Context) error{
			"role add":         func(ctx context.Context) error { _, err := k.RoleAdd(ctx, "x"); return err },
			"role delete":      func(ctx context.Context) error { _, err := k.RoleDelete(ctx, p+"auditor/carol"); return err },
			"user add":         func(ctx context.Context) error { _, err := k.UserAdd(ctx, "x", "x"); return err },
			"user delete":      func(ctx context.Context) error { _, err := k.UserDelete(ctx, "root"); return err },
			"own password":     func(ctx context.Context) error { _, err := k.UserChangePassword(ctx, w, "x"); return err },
			"give itself root": func(ctx context.Context) error { _, err := k.UserGrantRole(ctx, w, "root"); return err },
			"widen its role": func(ctx context.Context) error {
				_, err := k.RoleGrantPermission(ctx, p+strings.Replace(w, ":", "/", 1), "\x00", "\x00", clientv3.PermissionType(clientv3.PermReadWrite))
				return err
			},
			"authentication off": func(ctx context.Context) error { _, err := k.AuthDisable(ctx); return err },
			"all users":          func(ctx context.Context) error { _, err := k.UserList(ctx); return err },
			"another's role":     func(ctx context.Context) error { _, err := k.RoleGet(ctx, p+"node/zzz"); return err },
			"compact":            func(ctx context.Context) error { _, err := k.Compact(ctx, 1); return err },
			"defragment":         func(ctx context.Context) error { _, err := k.Defragment(ctx, c.etcd.Endpoint()); return err },
			"snapshot": func(ctx context.Context) error {
				r, err := k.Snapshot(ctx)
				if err == nil {
					_, err = r.Read(make([]byte, 1))
					r.Close()
				}
				return err
			},
			"alarms off": func(ctx context.Context) error {
				_, err := k.AlarmDisarm(ctx, &clientv3.AlarmMember{MemberID: 1, Alarm: pb.AlarmType_NOSPACE})
				return err
			},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			err := f(ctx)
			cancel()
			if !denied(err) {
				t.Errorf("%s, %s: %v, want a refusal", w, name, err)
			}
		}
	}
}

// denied is what etcd says to somebody that it knows, and to one it does not.
func denied(err error) bool {
	return err != nil && (errors.Is(err, rpctypes.ErrPermissionDenied) || errors.Is(err, rpctypes.ErrUserNotFound) ||
		strings.Contains(err.Error(), rpctypes.ErrPermissionDenied.Error()) || strings.Contains(err.Error(), rpctypes.ErrUserNotFound.Error()))
}

// attack tries all that can be done to a key or range.
func (c *cluster) attack(who string, k *clientv3.Client, key, end string, read, write bool) {
	ctx, cancel := context.WithTimeout(c.Context(), patience)
	defer cancel()
	put := func(key, value string) clientv3.Op { return clientv3.OpPut(key, value) }
	within := []clientv3.OpOption{}
	one := key
	if end != "" {
		within = append(within, clientv3.WithRange(end))
	}
	if one == "\x00" {
		one = "\x01"
	}
	if _, err := c.root.Put(ctx, one, "sound"); err != nil {
		c.Fatal(err)
	}
	never := clientv3.Compare(clientv3.CreateRevision(keys.Meta()), "=", -1)
	mine := clientv3.OpGet(keys.Stop("a")) // which all but strangers read
	type attempt struct {
		what string
		may  bool
		do   func() error
	}
	txn := func(t clientv3.Txn) func() error {
		return func() error { _, err := t.Commit(); return err }
	}
	get := clientv3.OpGet(key, within...)
	tries := []attempt{
		{"get", read, func() error { _, err := k.Get(ctx, key, within...); return err }},
		{"serializable get", read, func() error {
			_, err := k.Get(ctx, key, append(within, clientv3.WithSerializable())...)
			return err
		}},
		{"count", read, func() error { _, err := k.Get(ctx, key, append(within, clientv3.WithCountOnly())...); return err }},
		{"get in a transaction", read, txn(k.Txn(ctx).Then(get))},
		{"get in a branch that is not taken", read, txn(k.Txn(ctx).If(never).Then(get).Else(mine))},
		{"compare", read, txn(k.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key).WithRange(end), ">", 0)).Then(mine))},
		{"watch", read, func() error { return watch(ctx, k, key, within) }},
	}
	if end == "" {
		tries = append(
			tries,
			attempt{"put", write, func() error { _, err := k.Put(ctx, key, "forged"); return err }},
			attempt{"put in a transaction", write, txn(k.Txn(ctx).Then(put(key, "forged")))},
			attempt{"put in the other branch", write, txn(k.Txn(ctx).If(never).Then(mine).Else(put(key, "forged")))},
			attempt{"put in a transaction's transaction", write, txn(k.Txn(ctx).Then(clientv3.OpTxn(nil, []clientv3.Op{put(key, "forged")}, nil)))},
			attempt{"put that asks what was there", write && read, func() error { _, err := k.Put(ctx, key, "forged", clientv3.WithPrevKV()); return err }},
		)
	}
	tries = append(
		tries,
		attempt{"delete", write, func() error { _, err := k.Delete(ctx, key, within...); return err }},
		attempt{"delete in a transaction", write, txn(k.Txn(ctx).Then(clientv3.OpDelete(key, within...)))},
	)
	for _, try := range tries {
		err := try.do()
		what := fmt.Sprintf("%s, %s of %q", who, try.what, key)
		if end != "" {
			what += fmt.Sprintf(" to %q", end)
		}
		switch {
		case try.may && err != nil:
			c.Errorf("%s: %v", what, err)
		case !try.may && !denied(err):
			c.Errorf("%s: %v, want a refusal", what, err)
		}
		if write {
			continue
		}
		if r, err := c.root.Get(ctx, one); err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "sound" {
			c.Fatalf("%s: the key is changed (%v)", what, err)
		}
	}
	if write {
		// What was deleted with it comes back for the next.
		if _, err := c.root.Put(ctx, one, "sound"); err != nil {
			c.Fatal(err)
		}
	}
}

// watch opens a watch and says how that was answered.
func watch(ctx context.Context, k *clientv3.Client, key string, within []clientv3.OpOption) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, ok := <-k.Watch(ctx, key, append(within, clientv3.WithCreatedNotify())...)
	if !ok {
		return errors.New("the watch ended")
	}
	return r.Err()
}
