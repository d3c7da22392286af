package etcdcluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"
)

// DelayClients delays what passes between clients and member i, by d each way;
// ClientLinks must be set. Heal ends it.
func (c *Cluster) DelayClients(i int, d time.Duration) {
	c.n.change(func(links [][]link) {
		last := len(links) - 1
		links[i][last].delay, links[last][i].delay = d, d
	})
}

// Snapshot writes member i's state to a file, as "etcdctl snapshot save" does.
func (c *Cluster) Snapshot(ctx context.Context, i int, file string) error {
	cfg, err := c.Config(c.Direct(i))
	if err == nil {
		cfg.Endpoints = cfg.Endpoints[:1]
		_, err = snapshot.NewV3(zap.NewNop()).Save(ctx, cfg, file)
	}
	if err != nil {
		return fmt.Errorf("snapshot of member %s: %w", c.members[i].name, err)
	}
	return nil
}

// Restore kills all members and starts them with what is in the snapshot, as
// "etcdutl snapshot restore" on each does: etcd goes back in time. A token other
// than before makes etcd's cluster ID another one. What the members had is lost.
// It does not wait for them: see Wait.
func (c *Cluster) Restore(file, token string) error {
	if token == "" {
		return errors.New("etcd cluster: a restore needs a token")
	}
	for i := range c.members {
		c.Kill(i)
	}
	var initial []string
	for _, m := range c.members {
		initial = append(initial, m.name+"="+c.url(m.front[0].Addr().String()))
	}
	c.o.Token = token
	for i, m := range c.members {
		err := os.RemoveAll(c.Dir(i))
		if err == nil {
			err = snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
				SnapshotPath: file, Name: m.name, OutputDataDir: c.Dir(i), PeerURLs: []string{c.url(m.front[0].Addr().String())},
				InitialCluster: strings.Join(initial, ","), InitialClusterToken: token,
			})
		}
		if err != nil {
			return fmt.Errorf("member %s: restoring %s: %w", m.name, file, err)
		}
	}
	for i := range c.members {
		if err := c.Restart(i); err != nil {
			return err
		}
	}
	return nil
}

// Defragment gives the space that member i has freed back to its disk. Meanwhile
// the member answers nobody.
func (c *Cluster) Defragment(ctx context.Context, i int) error {
	cfg, err := c.Config(c.Direct(i))
	if err != nil {
		return err
	}
	client, err := clientv3.New(cfg)
	if err != nil {
		return fmt.Errorf("member %s: %w", c.members[i].name, err)
	}
	defer client.Close()
	if _, err := client.Defragment(ctx, c.Direct(i)); err != nil {
		return fmt.Errorf("member %s: defragmenting: %w", c.members[i].name, err)
	}
	return nil
}
