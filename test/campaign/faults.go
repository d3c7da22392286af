package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A hand injects one fault after the other. Faults of different hands overlap.
type hand struct {
	name  string
	kinds []kind
}

type kind struct {
	name   string
	weight int
	do     func(c *campaign, ctx context.Context, own *rand.Rand) error
}

// hands are all faults but the restore and what belongs to it, which a round ends
// with.
var hands = []hand{
	{"member", []kind{
		{"leader killed", 5, func(c *campaign, ctx context.Context, own *rand.Rand) error { return c.killMember(ctx, own, true) }},
		{"follower killed", 3, func(c *campaign, ctx context.Context, own *rand.Rand) error { return c.killMember(ctx, own, false) }},
		{"member paused", 4, (*campaign).pauseMember},
		{"minority cut off", 4, (*campaign).cutMember},
		{"all of etcd down", 2, (*campaign).allDown},
		{"NOSPACE by a full backend", 2, (*campaign).fillUp},
	}},
	{"link", []kind{
		{"clients cut off from a member", 3, (*campaign).cutClients},
		{"slow link to clients", 2, (*campaign).delayClients},
		{"slow link between members", 2, (*campaign).delayMember},
		{"slow disk", 2, (*campaign).slowDisk},
	}},
	{"machine", []kind{
		{"kill storm", 5, (*campaign).killStorm},
		{"reboot", 4, (*campaign).reboot},
		{"power loss", 4, (*campaign).powerLoss},
		{"re-image", 2, (*campaign).reimage},
		{"state directory lost", 2, (*campaign).loseState},
		{"clone", 2, (*campaign).tryClone},
	}},
	{"operator", []kind{
		{"compaction", 4, (*campaign).compact},
		{"NOSPACE by its alarm", 3, (*campaign).noSpace},
		{"freeze and thaw", 3, (*campaign).freezeThaw},
		{"release by an operator", 4, (*campaign).operatorRelease},
		{"unclaim", 3, (*campaign).unclaim},
		{"dead node drained", 2, func(c *campaign, ctx context.Context, own *rand.Rand) error { return c.farewell(ctx, own, "drain") }},
		{"dead node removed", 2, func(c *campaign, ctx context.Context, own *rand.Rand) error { return c.farewell(ctx, own, "remove") }},
		{"living node removed", 2, (*campaign).removeLiving},
		{"head spoilt, node replaced", 2, func(c *campaign, ctx context.Context, own *rand.Rand) error { return c.damageHead(ctx, own, false) }},
		{"head deleted, node replaced", 2, func(c *campaign, ctx context.Context, own *rand.Rand) error { return c.damageHead(ctx, own, true) }},
		{"verify under load", 3, (*campaign).verifyUnderLoad},
		{"pods forgotten, gc by the cluster's list", 3, (*campaign).forget},
	}},
	{"mistake", []kind{
		{"recover node for nothing, no list", 3, func(c *campaign, ctx context.Context, own *rand.Rand) error { return c.recoverIdle(ctx, own, "") }},
		{"recover node for nothing, a fresh list", 3, func(c *campaign, ctx context.Context, own *rand.Rand) error { return c.recoverIdle(ctx, own, "fresh") }},
		{"recover node for nothing, an old list", 3, func(c *campaign, ctx context.Context, own *rand.Rand) error { return c.recoverIdle(ctx, own, "old") }},
		{"gc by a list given twice, and an older one", 3, (*campaign).staleLists},
		{"import again", 3, (*campaign).importAgain},
	}},
}

// inject is one hand at work.
func (c *campaign) inject(ctx context.Context, h hand, own *rand.Rand) {
	var from []kind
	weights := 0
	for _, k := range h.kinds {
		if k.name == "slow disk" && c.fixedDisk != nil {
			continue
		}
		if len(c.only) == 0 || slices.Contains(c.only, k.name) {
			from = append(from, k)
			weights += k.weight
		}
	}
	if weights == 0 {
		return
	}
	for {
		sleep(ctx, time.Duration(own.ExpFloat64()*float64(c.pause)))
		if ctx.Err() != nil {
			return
		}
		c.calm.RLock()
		x := own.IntN(weights)
		for _, k := range from {
			if x -= k.weight; x < 0 {
				c.fault(ctx, k.name, func() error { return k.do(c, ctx, own) })
				break
			}
		}
		c.calm.RUnlock()
	}
}

// fault injects one and takes down how it went.
func (c *campaign) fault(ctx context.Context, name string, do func() error) {
	if ctx.Err() != nil {
		return
	}
	c.note("begins: %s", name)
	done := c.faults.begin(c, name)
	err := do()
	done()
	if err != nil && ctx.Err() == nil {
		c.finding("%s: %v", name, err)
	}
	c.note("ends: %s", name)
}

// between draws a time.
func between(own *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(own.Int64N(int64(most-least)))
}

func (c *campaign) anyMember(own *rand.Rand) int { return own.IntN(c.cluster.Members()) }

// well waits until all members serve again.
func (c *campaign) well(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return c.cluster.Wait(ctx)
}

func (c *campaign) killMember(ctx context.Context, own *rand.Rand, leader bool) error {
	defer c.excuse("a member is killed", nil, codeTryAgain)()
	one, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	i, err := c.cluster.Leader(one)
	if err != nil {
		return err
	}
	if !leader {
		i = (i + 1 + own.IntN(c.cluster.Members()-1)) % c.cluster.Members()
	}
	c.cluster.Kill(i)
	sleep(ctx, between(own, 100*time.Millisecond, 6*time.Second))
	if err := c.cluster.Restart(i); err != nil {
		return err
	}
	return c.well(ctx)
}

func (c *campaign) pauseMember(ctx context.Context, own *rand.Rand) error {
	defer c.excuse("a member is paused", nil, codeTryAgain)()
	i := c.anyMember(own)
	if err := c.cluster.Pause(i); err != nil {
		return err
	}
	sleep(ctx, between(own, 200*time.Millisecond, 6*time.Second))
	if err := c.cluster.Resume(i); err != nil {
		return err
	}
	return c.well(ctx)
}

func (c *campaign) cutMember(ctx context.Context, own *rand.Rand) error {
	defer c.excuse("a member is cut off", nil, codeTryAgain)()
	i := c.anyMember(own)
	switch own.IntN(4) {
	case 0: // it hears the others, and is not heard
		for j := range c.cluster.Members() {
			if j != i {
				c.cluster.CutLink(i, j)
			}
		}
	case 1:
		c.cluster.CutClients(i)
		fallthrough
	default:
		c.cluster.Cut(i)
	}
	sleep(ctx, between(own, 500*time.Millisecond, 8*time.Second))
	c.cluster.Heal(i)
	return c.well(ctx)
}

func (c *campaign) cutClients(ctx context.Context, own *rand.Rand) error {
	defer c.excuse("clients are cut off", nil, codeTryAgain)()
	i := c.anyMember(own)
	c.cluster.CutClients(i)
	sleep(ctx, between(own, 500*time.Millisecond, 8*time.Second))
	c.cluster.Heal(i)
	return nil
}

func (c *campaign) delayClients(ctx context.Context, own *rand.Rand) error {
	defer c.excuse("a slow link", nil, codeTryAgain)()
	i := c.anyMember(own)
	c.cluster.DelayClients(i, between(own, 20*time.Millisecond, 400*time.Millisecond))
	sleep(ctx, between(own, time.Second, 8*time.Second))
	c.cluster.Heal(i)
	return nil
}

func (c *campaign) delayMember(ctx context.Context, own *rand.Rand) error {
	defer c.excuse("a slow link", nil, codeTryAgain)()
	i := c.anyMember(own)
	c.cluster.Delay(i, between(own, 20*time.Millisecond, 300*time.Millisecond))
	sleep(ctx, between(own, time.Second, 8*time.Second))
	c.cluster.Heal(i)
	return c.well(ctx)
}

func (c *campaign) slowDisk(ctx context.Context, own *rand.Rand) error {
	defer c.excuse("a slow disk", nil, codeTryAgain)()
	var slow []int
	for i := range c.cluster.Members() {
		if len(slow) == 0 || own.IntN(3) == 0 {
			// An error says that the member is being started: then it holds from there on.
			_ = c.cluster.SlowDisk(i, between(own, 20*time.Millisecond, 400*time.Millisecond))
			slow = append(slow, i)
		}
	}
	sleep(ctx, between(own, time.Second, 8*time.Second))
	for _, i := range slow {
		_ = c.cluster.SlowDisk(i, 0)
	}
	return c.well(ctx)
}

func (c *campaign) allDown(ctx context.Context, own *rand.Rand) error {
	defer c.excuse("all of etcd is down", nil, codeTryAgain, codeUnreachable)()
	for i := range c.cluster.Members() {
		c.cluster.Kill(i)
	}
	sleep(ctx, between(own, time.Second, 8*time.Second))
	for i := range c.cluster.Members() {
		if err := c.cluster.Restart(i); err != nil {
			return err
		}
	}
	return c.well(ctx)
}

// compact forgets what was, at once or soon, and sometimes defragments a member.
func (c *campaign) compact(ctx context.Context, own *rand.Rand) error {
	one, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	g, err := c.client.Get(one, c.keys.Meta())
	if err != nil {
		return nil // etcd is away: another time
	}
	var opts []clientv3.CompactOption
	if own.IntN(2) == 0 {
		opts = append(opts, clientv3.WithCompactPhysical())
	}
	_, _ = c.client.Compact(one, max(1, g.Header.Revision-own.Int64N(50)), opts...)
	if own.IntN(2) == 0 {
		over := c.excuse("a member is defragmented", nil, codeTryAgain)
		_ = c.cluster.Defragment(one, c.anyMember(own)) // it may be away
		over()
	}
	return nil
}

// noSpace raises the alarm that a full backend raises. Nothing but etcd notices
// whether there is space.
func (c *campaign) noSpace(ctx context.Context, own *rand.Rand) error {
	over := c.excuse("NOSPACE", nil, codeTryAgain)
	defer over()
	alarm := func(action etcdserverpb.AlarmRequest_AlarmAction) error {
		one, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		st, err := c.client.Status(one, c.cluster.Direct(0))
		if err != nil {
			return err
		}
		_, err = etcdserverpb.NewMaintenanceClient(c.client.ActiveConnection()).Alarm(one, &etcdserverpb.AlarmRequest{
			Action: action, MemberID: st.Header.MemberId, Alarm: etcdserverpb.AlarmType_NOSPACE,
		})
		return err
	}
	if alarm(etcdserverpb.AlarmRequest_ACTIVATE) == nil {
		sleep(ctx, between(own, time.Second, 6*time.Second))
	}
	return c.disarm(ctx)
}

// disarm ends all alarms.
func (c *campaign) disarm(ctx context.Context) error {
	for began := c.now(); ; {
		one, cancel := context.WithTimeout(ctx, 3*time.Second)
		l, err := c.client.AlarmList(one)
		if err == nil && len(l.Alarms) > 0 {
			_, err = c.client.AlarmDisarm(one, &clientv3.AlarmMember{})
			if err == nil {
				l, err = c.client.AlarmList(one)
			}
		}
		cancel()
		if err == nil && len(l.Alarms) == 0 || ctx.Err() != nil {
			return nil
		}
		if c.now()-began > time.Minute {
			return fmt.Errorf("the alarm cannot be ended: %w", err)
		}
		sleep(ctx, 200*time.Millisecond)
	}
}

// verifyUnderLoad: a reading of the whole ledger while it changes, and is
// compacted, never ends with a finding.
func (c *campaign) verifyUnderLoad(ctx context.Context, _ *rand.Rand) error {
	_, err := c.must(ctx, nil, "", nil, "verify")
	return err
}

func (c *campaign) killStorm(ctx context.Context, own *rand.Rand) error {
	c.storm.Add(1)
	defer c.storm.Add(-1)
	sleep(ctx, between(own, 2*time.Second, 8*time.Second))
	return nil
}

// freezeThaw keeps everybody from allocating for a while.
func (c *campaign) freezeThaw(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	// STATUS never fails for what is cluster-wide, and CHECK changes nothing.
	defer c.excuseVerbs("frozen", nil, []string{"ADD", "GC"}, codeIntegrity)()
	if _, err := c.must(ctx, nil, "", nil, "freeze", "--reason", "a campaign"); err != nil {
		return err
	}
	c.setFrozen(true)
	sleep(ctx, between(own, 300*time.Millisecond, 4*time.Second))
	c.setFrozen(false)
	_, err := c.must(ctx, nil, "", nil, "thaw", "--reason", "a campaign")
	return err
}

// operatorRelease ends the lease of a pod whose runtime has lost it, by hand. The
// DEL comes later.
func (c *campaign) operatorRelease(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	p := c.pick(own)
	if p == nil {
		return nil
	}
	defer p.m.rest(p)
	return c.endByHand(ctx, p, own)
}

// endByHand releases what a pod has, which its caller keeps the runtimes from.
func (c *campaign) endByHand(ctx context.Context, p *pod, own *rand.Rand) error {
	ip := p.ips[own.IntN(len(p.ips))]
	c.book.doubt(p, c.now(), ending)
	_, err := c.must(ctx, nil, "", func(r *reply) bool {
		// An earlier run of it was killed, or did not hear that it was done.
		return strings.Contains(r.stderr, "nobody holds") || strings.Contains(r.stderr, "holds nothing")
	}, "release", ip.String(), "--yes", "--reason", "its pod is gone")
	return err
}

// pick takes a pod that runs and keeps the runtimes from it.
func (c *campaign) pick(own *rand.Rand) *pod {
	c.book.Lock()
	defer c.book.Unlock()
	m := c.machines[own.IntN(len(c.machines))]
	for _, p := range m.pods {
		if p.phase == live && !p.busy && len(p.ips) > 0 {
			p.busy = true
			return p
		}
	}
	return nil
}

// unclaim gives a block back: it is refused while an address of it is leased.
func (c *campaign) unclaim(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	block := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, 0, byte(own.IntN(16) * 16)}), blockBits)
	_, err := c.must(ctx, nil, "", func(r *reply) bool { return r.exit == 1 }, "unclaim", "default/"+network+"/"+block.String(), "--reason", "a campaign")
	return err
}

// farewell is a machine that dies and is drained or removed; later it comes back
// all the same.
func (c *campaign) farewell(ctx context.Context, own *rand.Rand, how string) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	m := c.machines[own.IntN(len(c.machines))]
	m.powerOff(forgotten)
	defer m.powerOn()
	unknown := false
	_, err := c.must(ctx, nil, "", func(r *reply) bool {
		unknown = strings.Contains(r.stderr, "etcd knows no node")
		return unknown
	}, "node", how, m.name, "--yes", "--reason", "it burnt down")
	if err != nil || unknown {
		return err
	}
	sleep(ctx, between(own, 0, 2*time.Second))
	m.boot()
	if how == "drain" {
		return c.sweep(ctx, m)
	}
	// It is refused as long as it remembers pods.
	return c.comeBack(ctx, m, own)
}

// sweep frees what the machine's runtime does not know, as a timer does. The
// caller owns the machine.
func (c *campaign) sweep(ctx context.Context, m *machine) error {
	for range 2 {
		_, err := c.mustWith(ctx, m, m.sandboxes, nil, "gc", "--containers", "-", "--yes", "--grace", "0s", "--reason", "a campaign")
		if err != nil {
			return err
		}
	}
	return nil
}

// comeBack starts a pod on a machine whose identity is in doubt, and does what
// its errors say until that succeeds. The caller owns the machine.
func (c *campaign) comeBack(ctx context.Context, m *machine, own *rand.Rand) error {
	defer c.excuse("its identity is in doubt", m, codeIntegrity)()
	for try := 0; ctx.Err() == nil; try++ {
		p, r := c.tryADD(m, own)
		if r.ok() {
			// What ran before and is not remembered is for the list to settle.
			return c.relist(ctx, m)
		}
		c.note("%s", r.text())
		if d := c.call(m, "DEL", p.container, conf(m.file, ""), p.args(), kill{}, own); d.ok() {
			m.deleted(p, d)
			m.rest(p)
		} else {
			c.judge("DEL", m, d)
		}
		var err error
		switch {
		case strings.Contains(r.said, "ledger node replace "+m.name):
			_, err = c.must(ctx, nil, "", nil, "node", "replace", m.name, "--reason", "set up anew")
		case strings.Contains(r.said, "ledger recover node"):
			err = c.relist(ctx, m)
		case r.code == codeTryAgain:
			c.judge("ADD", m, r)
			sleep(ctx, 300*time.Millisecond)
		case r.code == codeExhausted && try < 50:
			if err = c.sweep(ctx, m); err != nil {
				return err
			}
			sleep(ctx, 300*time.Millisecond)
		default:
			return fmt.Errorf("no way out is named: %s", r.text())
		}
		if err != nil {
			return err
		}
		if try > 100 {
			return fmt.Errorf("after %d steps it is refused still: %s", try, r.text())
		}
	}
	return nil
}

// tryADD starts a pod on a machine that its caller owns.
func (c *campaign) tryADD(m *machine, own *rand.Rand) (*pod, *reply) {
	m.serial++
	container := fmt.Sprintf("%s-%06d", m.name, m.serial)
	p := c.book.add(m, container, fmt.Sprintf("pod-%d", m.serial), "uid-"+container)
	c.book.Lock()
	m.pods = append(m.pods, p)
	c.book.Unlock()
	p.begun = c.now()
	r := c.call(m, "ADD", container, conf(m.file, ""), p.args(), kill{}, own)
	if r.ok() {
		m.answered(p, r, nil)
	} else {
		c.book.doubt(p, r.began, ending)
	}
	return p, r
}

// relist runs 'recover node' with the runtime's list. The second list proves what
// the first did not have.
func (c *campaign) relist(ctx context.Context, m *machine) error {
	for try := 0; ; try++ {
		r, err := c.mustWith(ctx, m, m.sandboxes, func(r *reply) bool {
			return strings.Contains(r.stderr, "move the named files away") || try < 3 && strings.Contains(r.stdout, "conflict")
		}, "recover", "node", "--containers", "-", "--grace", "0s", "--reason", "a campaign")
		if err != nil || r.exit == 0 {
			return err
		}
		if strings.Contains(r.stdout, "conflict") {
			continue
		}
		// It did not say which files: they were torn, and their pods are gone.
		if moved := m.moveAway(r); moved == 0 {
			return fmt.Errorf("no file that can be moved away is named: %s", r.text())
		}
	}
}

// moveAway removes the holdings that a reply names.
func (m *machine) moveAway(r *reply) (moved int) {
	for _, file := range m.files("holdings/*.json") {
		if strings.Contains(r.stderr, file) && os.Remove(file) == nil {
			moved++
		}
	}
	return moved
}

// forget lets runtimes forget pods, whose leases are then found by the list of
// all pods of the cluster.
func (c *campaign) forget(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	for range 1 + own.IntN(5) {
		if p := c.pick(own); p != nil {
			c.book.doubt(p, c.now(), forgotten)
			p.m.rest(p)
		}
	}
	return c.gcPods(ctx)
}

func (c *campaign) gcPods(ctx context.Context) error {
	for range 2 {
		if _, err := c.mustWith(ctx, nil, c.podList, nil, "gc", "--pods", "-", "--yes", "--grace", "500ms", "--reason", "a campaign"); err != nil {
			return err
		}
		sleep(ctx, 600*time.Millisecond)
	}
	return nil
}

// podList is what 'kubectl get pods --all-namespaces -o json' would write.
func (c *campaign) podList() string {
	type meta struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
		UID       string `json:"uid"`
	}
	type item struct {
		Kind     string `json:"kind"`
		Metadata meta   `json:"metadata"`
	}
	// There is always one of another network.
	items := []item{{"Pod", meta{"kube-system", "somebody", "uid-somebody"}}}
	c.book.Lock()
	for _, p := range c.book.pods {
		if p.phase != gone && p.phase != forgotten {
			items = append(items, item{"Pod", meta{"campaign", p.name, p.uid}})
		}
	}
	c.book.Unlock()
	b, _ := json.Marshal(map[string]any{"kind": "List", "items": items}) // strings alone
	return string(b)
}

// reboot is a machine that goes off and on. Its pods are gone; the runtime either
// remembers them, or has lost them too.
func (c *campaign) reboot(ctx context.Context, own *rand.Rand) error {
	m := c.machines[own.IntN(len(c.machines))]
	to := ending
	if own.IntN(2) == 0 {
		to = forgotten
	}
	c.admin.Lock() // what it runs must not meet a freeze
	defer c.admin.Unlock()
	m.powerOff(to)
	defer m.powerOn()
	sleep(ctx, between(own, 0, time.Second))
	m.boot()
	if to == forgotten {
		return c.sweep(ctx, m)
	}
	return nil
}

// unsynced are the files of a state directory that a power loss may damage.
var unsynced = []string{"mark", "open", "blocks", "pools/*", "holdings/*.json", "suspects"}

// powerLoss is a machine whose power goes while it works; what was not fsynced
// is what the disk had before, torn, or gone.
func (c *campaign) powerLoss(ctx context.Context, own *rand.Rand) error {
	m := c.machines[own.IntN(len(c.machines))]
	older := map[string][]byte{}
	m.mu.Lock()
	for _, file := range m.files(unsynced...) {
		older[file], _ = os.ReadFile(file)
	}
	m.mu.Unlock()
	sleep(ctx, between(own, 0, 2*time.Second))
	c.admin.Lock()
	defer c.admin.Unlock()
	to := ending
	if own.IntN(2) == 0 {
		to = forgotten
	}
	m.powerOff(to)
	defer m.powerOn()
	for _, file := range m.files(unsynced...) {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if b = damage(own, b, older[file]); b == nil {
			err = os.Remove(file)
		} else {
			err = os.WriteFile(file, b, 0o600)
		}
		if err != nil {
			return err
		}
	}
	m.boot()
	if to == forgotten {
		return c.sweep(ctx, m)
	}
	return nil
}

// damage is what a power loss makes of a file; nil: it is gone.
func damage(own *rand.Rand, b, older []byte) []byte {
	switch own.IntN(7) {
	case 0:
		return nil
	case 1:
		return []byte{}
	case 2:
		return b[:len(b)/3]
	case 3:
		return append(slices.Clone(b[:len(b)/3]), make([]byte, len(b)-len(b)/3)...)
	case 4:
		return make([]byte, len(b))
	case 5:
		return older
	}
	return bytes.Clone(b)
}

// reimage is a machine that is set up anew under its old name.
func (c *campaign) reimage(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	m := c.machines[own.IntN(len(c.machines))]
	m.powerOff(forgotten)
	defer m.powerOn()
	m.sets++
	if err := m.lose(); err != nil {
		return err
	}
	m.boot()
	return c.comeBack(ctx, m, own)
}

// loseState is a state directory that somebody removed. The pods run on.
func (c *campaign) loseState(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	m := c.machines[own.IntN(len(c.machines))]
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.lose(); err != nil {
		return err
	}
	return c.comeBack(ctx, m, own)
}

// lose removes the state directory, and with it the releases that wait.
func (m *machine) lose() error {
	m.c.book.Lock()
	for _, p := range m.c.book.pods {
		if p.m == m && p.phase == gone {
			p.phase = forgotten
		}
	}
	m.c.book.Unlock()
	if err := os.RemoveAll(m.state); err != nil {
		return err
	}
	if err := os.MkdirAll(m.state, 0o700); err != nil {
		return err
	}
	return m.rewatch()
}

// tryClone copies a state directory to another machine, where it is refused.
func (c *campaign) tryClone(ctx context.Context, own *rand.Rand) error {
	if !c.clone.own {
		return nil
	}
	m := c.machines[own.IntN(len(c.machines))]
	state, file := filepath.Join(c.dir, "clone"), filepath.Join(c.dir, "clone.json")
	defer os.RemoveAll(state)
	m.mu.Lock()
	err := copyDir(m.state, state)
	mark, merr := c.dirOf(m).LoadMark()
	m.mu.Unlock()
	if err != nil {
		return err
	}
	if merr != nil || mark == nil {
		return nil // nothing by which it could be recognised
	}
	other := &machine{c: c, name: m.name, host: c.clone, state: state, file: file}
	if err := other.configure(file, state, c.cluster.Endpoints()); err != nil {
		return err
	}
	for _, verb := range []string{"ADD", "STATUS", "ADD"} {
		if verb == "STATUS" {
			_ = os.Remove(filepath.Join(state, "asked"))
		}
		r := c.call(other, verb, "clone", conf(file, ""), "", kill{}, own)
		if ctx.Err() == nil && (r.code != codeIntegrity || !strings.Contains(r.said, "machine")) {
			return fmt.Errorf("a clone was not refused with %d: %s %v", codeIntegrity, r.text(), r.ips)
		}
	}
	if r := c.call(other, "DEL", "clone", conf(file, ""), "", kill{}, own); !r.ok() && ctx.Err() == nil {
		return fmt.Errorf("DEL on a clone: %s", r.text())
	}
	return nil
}

// faultStats are how often each fault was injected, and when.
type faultStats struct {
	sync.Mutex
	all map[string][]episode
}

// episode is one fault and what the plugin answered meanwhile.
type episode struct {
	from, to                         time.Duration
	calls, failed, killed, answeredN int64
}

func (f *faultStats) begin(c *campaign, name string) (done func()) {
	e := episode{from: c.now()}
	calls, failed, killed := c.counts.sums()
	answered := c.serves.len()
	return func() {
		e.to = c.now()
		a, b, k := c.counts.sums()
		e.calls, e.failed, e.killed, e.answeredN = a-calls, b-failed, k-killed, int64(c.serves.len()-answered)
		f.Lock()
		defer f.Unlock()
		if f.all == nil {
			f.all = map[string][]episode{}
		}
		f.all[name] = append(f.all[name], e)
	}
}

func (f *faultStats) total() (n int) {
	f.Lock()
	defer f.Unlock()
	for _, e := range f.all {
		n += len(e)
	}
	return n
}
