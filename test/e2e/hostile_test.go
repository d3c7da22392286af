package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// The verbs that runtimes call.
var allVerbs = []string{"ADD", "DEL", "CHECK", "GC", "STATUS"}

// What a call on hostile input may take at most, of the processor and of memory.
const (
	hostileTime   = 10 * time.Second
	hostileMemory = 768 << 20
)

// raw is a call of the plugin with any environment and standard input.
func (n *node) raw(verb string, stdin []byte, env ...string) *reply {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := n.command(ctx, verb, "c1", network{}, env...)
	cmd.Stdin = bytes.NewReader(stdin)
	r := run(n.t, cmd)
	r.what = verb
	r.version = "1.1.0"
	r.isClean()
	if used := cmd.ProcessState.SysUsage().(*syscall.Rusage); used.Maxrss<<10 > hostileMemory {
		n.t.Errorf("%s: took %d MiB", verb, used.Maxrss>>10)
	}
	if took := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(); took > hostileTime {
		n.t.Errorf("%s: took %s of the processor", verb, took)
	}
	for _, b := range []byte(r.stderr) {
		if b < 0x20 && b != '\n' && b != '\t' || b == 0x7f {
			n.t.Errorf("%s: stderr holds the control character %#02x: %.500q", verb, b, r.stderr)
			break
		}
	}
	if len(r.stdout) > 64<<10 {
		n.t.Errorf("%s: an answer of %d bytes: %.300s…", verb, len(r.stdout), r.stdout)
	}
	return r
}

// one checks that a call failed with one of codes and one JSON document.
func (r *reply) one(codes ...int) {
	r.t.Helper()
	var f failure
	if r.exit == 0 {
		r.t.Errorf("%s: succeeded, want one of the codes %v\n%.1000s%.1000s", r.what, codes, r.stdout, r.stderr)
		return
	}
	if err := json.Unmarshal([]byte(r.stdout), &f); err != nil || f.Msg == "" {
		r.t.Errorf("%s: exit status %d and no error on stdout: %v\n%.1000s%.1000s", r.what, r.exit, err, r.stdout, r.stderr)
		return
	}
	if !slices.Contains(codes, f.Code) {
		r.t.Errorf("%s: code %d, want one of %v: %s: %s", r.what, f.Code, codes, f.Msg, f.Details)
	}
}

// unchanged checks that nothing was written to etcd since.
func (c *cluster) unchanged(since map[string][]byte) {
	c.t.Helper()
	now := c.kvs(keys.Prefix())
	for k, v := range now {
		if old, ok := since[k]; !ok || !bytes.Equal(old, v) {
			c.t.Errorf("%.300q was written: %.300q", k, v)
		}
	}
	if len(now) < len(since) {
		c.t.Errorf("%d keys were there, and %d are", len(since), len(now))
	}
}

// TestHostileConfigurations: whatever stands on standard input, one error answers
// it, and etcd never hears of it. DEL alone may succeed: it must free an address
// also where nothing else of its configuration makes sense any more.
func TestHostileConfigurations(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	n.call("ADD", "other", subnet("10.1.0.0/24")).ok()
	before := c.kvs(keys.Prefix())
	good := subnet("10.1.0.0/24").with(`"cni.dev/valid-attachments": []`).json(n)
	ipam := func(members string) string { return network{ipam: members}.json(n) }
	big := func(n int, f func(i int) string) string {
		var b strings.Builder
		for i := 0; b.Len() < n; i++ {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(f(i))
		}
		return b.String()
	}
	mib := 1 << 17 // with IPAM_LEDGER_FULL=1 eight times as much
	if os.Getenv("IPAM_LEDGER_FULL") != "" {
		mib = 1 << 20
	}
	decoding, config, either := []int{codeDecoding}, []int{codeConfig}, []int{codeDecoding, codeConfig}
	for _, x := range []struct {
		name, stdin string
		codes       []int
		lenient     bool // verbs other than ADD may do without it
	}{
		{"nothing", "", decoding, false},
		{"blanks", " \n\t", decoding, false},
		{"NUL", "\x00", decoding, false},
		{"not UTF-8", "\xff\xfe{}", decoding, false},
		{"a byte order mark", "\ufeff" + good, decoding, false},
		{"null", "null", either, false},
		{"a list", "[" + good + "]", decoding, false},
		{"a string", `"x"`, decoding, false},
		{"a number", "1e999", decoding, false},
		{"half", good[:len(good)/2], decoding, false},
		{"twice", good + good, decoding, false},
		{"followed by NUL", good + "\x00", decoding, false},
		{"an empty object", "{}", either, false},
		{"10,000 lists deep", `{"cniVersion":"1.1.0","name":"net","ipam":` + strings.Repeat("[", 10001), decoding, false},
		{"many lists deep", strings.Repeat("[", mib), decoding, false},
		{"many objects deep", strings.Repeat(`{"ipam":`, mib), decoding, false},
		{"10 MiB of blanks", strings.Repeat(" ", 10*mib), decoding, false},
		{"10 MiB in the name", `{"cniVersion":"1.1.0","name":"` + strings.Repeat("n", 10*mib) + `","ipam":{"type":"ipam-ledger"}}`, config, false},
		{"a name of 300 bytes", `{"cniVersion":"1.1.0","name":"` + strings.Repeat("n", 300) + `","ipam":{"type":"ipam-ledger"}}`, config, false},
		{"no name", strings.Replace(good, `"name": "net"`, `"name": ""`, 1), config, false},
		{"a name with a slash", strings.Replace(good, `"name": "net"`, `"name": "net/../x"`, 1), config, false},
		{"a name of dots", strings.Replace(good, `"name": "net"`, `"name": ".."`, 1), config, false},
		{"a name with a line break", strings.Replace(good, `"name": "net"`, `"name": "net\nx"`, 1), config, false},
		{"a name with NUL", strings.Replace(good, `"name": "net"`, `"name": "net\u0000"`, 1), config, false},
		{"a name with an escape", strings.Replace(good, `"name": "net"`, `"name": "net\u001b[2J"`, 1), config, false},
		{"a name that is not UTF-8", strings.Replace(good, `"name": "net"`, "\"name\": \"net\xff\"", 1), config, false},
		{"a name of a wrong type", strings.Replace(good, `"name": "net"`, `"name": 7`, 1), either, false},
		{"a name that stands twice", strings.Replace(good, `"name": "net"`, `"name": "net", "name": "other"`, 1), config, true},
		{"a version of a wrong type", strings.Replace(good, `"1.1.0"`, `11`, 1), either, false},
		{"an enormous version", strings.Replace(good, `"1.1.0"`, `"`+strings.Repeat("1.", 10_000)+`"`, 1), []int{codeVersion, codeDecoding, codeConfig}, false},
		{"a version with an escape", strings.Replace(good, `"1.1.0"`, `"1.1.0\u001b[2J"`, 1), []int{codeVersion, codeDecoding, codeConfig}, false},
		{"no ipam", `{"cniVersion":"1.1.0","name":"net"}`, config, false},
		{"ipam is a list", `{"cniVersion":"1.1.0","name":"net","ipam":[]}`, config, false},
		{"ipam is null", `{"cniVersion":"1.1.0","name":"net","ipam":null}`, config, false},
		{"an unknown key", ipam(`"subnet": "10.1.0.0/24", "hostile": true`), config, true},
		{"an unknown key with an escape", ipam(`"subnet": "10.1.0.0/24", "\u001b[2J": true`), config, true},
		{"an unknown key of 10 MiB", ipam(`"subnet": "10.1.0.0/24", "` + strings.Repeat("k", 10*mib) + `": true`), config, true},
		{"10 MiB of unknown keys", ipam(`"subnet": "10.1.0.0/24", ` + big(10*mib, func(i int) string { return fmt.Sprintf(`"k%d":1`, i) })), config, true},
		{"10 MiB of keys that stand twice", ipam(`"subnet": "10.1.0.0/24", ` + big(10*mib, func(i int) string { return fmt.Sprintf(`"k%d":1`, i/2) })), config, true},
		{"10 MiB of one key", ipam(big(10*mib, func(int) string { return `"subnet":"10.1.0.0/24"` })), config, true},
		{"10 MiB of top-level keys that stand twice", strings.TrimSuffix(good, "}") + "," + big(10*mib, func(i int) string { return fmt.Sprintf(`"k%d":1`, i/2) }) + "}", config, true},
		{"a subnet of a wrong type", ipam(`"subnet": {"subnet": []}`), config, true},
		{"a subnet with an escape", ipam(`"subnet": "\u001b]0;owned\u0007"`), config, true},
		{"a subnet of 10 MiB", ipam(`"subnet": "` + strings.Repeat("1", 10*mib) + `"`), config, true},
		{"a subnet of nothing", ipam(`"subnet": "10.1.0.0/99"`), config, true},
		{"10 MiB of ranges", ipam(`"ranges": [[` + big(10*mib, func(i int) string {
			return fmt.Sprintf(`{"subnet":"%d.%d.%d.0/24"}`, 1+i>>16&0x7f, i>>8&255, i&255)
		}) + `]]`), config, true},
		{"10 MiB of range sets", ipam(`"ranges": [` + big(10*mib, func(i int) string { return `[{"subnet":"10.1.0.0/24"}]` }) + `]`), config, true},
		{"10 MiB of addresses asked for", network{ipam: `"subnet": "10.1.0.0/16"`, more: `"runtimeConfig": {"ips": [` + big(10*mib, func(i int) string {
			return fmt.Sprintf(`"%d.%d.%d.%d"`, 1+i>>24, i>>16&255, i>>8&255, i&255)
		}) + `]}`}.json(n), config, true},
		{"an address asked for with an escape", network{ipam: `"subnet": "10.1.0.0/24"`, more: `"runtimeConfig": {"ips": ["\u001b[2J"]}`}.json(n), config, true},
		{"10 MiB of routes", ipam(`"subnet": "10.1.0.0/24", "routes": [` + big(10*mib, func(int) string { return `{"dst":"x"}` }) + `]`), config, true},
		{"a route of wrong numbers", ipam(`"subnet": "10.1.0.0/24", "routes": [{"dst":"0.0.0.0/0","mtu":1e99}]`), config, true},
		{"a block size of 1e30", ipam(`"subnet": "10.1.0.0/24", "blockSize": 1e30`), config, true},
		{"a block size of -64", ipam(`"subnet": "10.1.0.0/24", "blockSize": -64`), config, true},
		{"a cooldown of many years", ipam(`"subnet": "10.1.0.0/24", "cooldown": "8760000000h"`), config, true},
		{"an address space with a slash", ipam(`"subnet": "10.1.0.0/24", "addressSpace": "a/b"`), config, true},
		{"a pool with a slash", ipam(`"pool": "a/b"`), config, true},
		{"a pool with an escape", ipam(`"pool": "\u001b[2J"`), config, true},
		{"a node with a slash", ipam(`"subnet": "10.1.0.0/24", "node": "a/b"`), config, false},
		{"a prefix of 300 bytes", ipam(`"subnet": "10.1.0.0/24", "prefix": "/` + strings.Repeat("p", 300) + `/"`), config, false},
		{"a time limit of nothing", ipam(`"subnet": "10.1.0.0/24", "timeout": "0s"`), config, true},
		{"10 MiB excluded", ipam(`"subnet": "10.1.0.0/24", "exclude": [` + big(10*mib, func(int) string { return `"10.1.0.0/24"` }) + `]`), config, true},
		{"a state directory that is none", ipam(`"subnet": "10.1.0.0/24", "stateDir": "/dev/null/x"`), []int{codeConfig, codeIO, codeTryAgain}, false},
		{"a state directory with NUL", ipam(`"subnet": "10.1.0.0/24", "stateDir": "/tmp/\u0000"`), []int{codeConfig, codeIO, codeTryAgain}, false},
		{"a resolvConf that never ends", ipam(`"subnet": "10.1.0.0/24", "resolvConf": "/dev/zero"`), config, true},
	} {
		t.Run(x.name, func(t *testing.T) {
			m := *n
			m.cluster = &cluster{t: t, etcd: c.etcd, dir: c.dir}
			for _, verb := range allVerbs {
				if verb != "ADD" && verb != "DEL" && len(x.stdin) > mib {
					continue // the same code, and the machine's time
				}
				r := m.raw(verb, []byte(x.stdin))
				if x.lenient && verb != "ADD" && r.exit == 0 {
					continue
				}
				if codes := x.codes; !x.lenient || verb == "ADD" {
					r.one(codes...)
				} else {
					r.one(append(slices.Clone(codes), codeMismatch)...)
				}
			}
		})
	}
	c.unchanged(before)
	c.wantLeased("10.1.0.2")
}

// TestHostileGC: a list of valid attachments that cannot be taken at its word
// releases nothing.
func TestHostileGC(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := subnet("10.1.0.0/24")
	n.call("ADD", "c1", w).ok()
	for _, list := range []string{
		`null`, `{}`, `"c1"`, `7`, `[null]`, `[[]]`, `["c1"]`, `[{}]`, `[{"containerID":"c1"}]`, `[{"ifname":"eth0"}]`, `[{"containerID":1,"ifname":"eth0"}]`,
		`[{"containerID":"c1","ifname":""}]`, `[{"ContainerID":"c1","ifname":"eth0"}]`, `[], "cni.dev/valid-attachments": []`,
	} {
		r := n.raw("GC", []byte(w.with(`"cni.dev/valid-attachments": `+list).json(n)))
		r.what = "GC with " + list
		r.one(codeConfig)
	}
	// What is no name of ours cannot be an attachment of ours either.
	n.raw("GC", []byte(w.with(`"cni.dev/valid-attachments": [{"containerID":"c1","ifname":"eth0"},{"containerID":"../c1","ifname":"\u001b[2J"}]`).json(n))).ok()
	c.wantLeased("10.1.0.2")
}

// TestHostileEnvironment: names with whatever the environment can carry.
func TestHostileEnvironment(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := subnet("10.1.0.0/24")
	stdin := []byte(w.with(`"cni.dev/valid-attachments": [{"containerID":"other","ifname":"eth0"}]`).json(n))
	n.call("ADD", "other", w).ok()
	before := c.kvs(keys.Prefix())
	long := strings.Repeat("x", 100_000) // the kernel takes 128 KiB a variable
	for _, x := range []struct {
		env   []string
		verbs []string // that must fail; the others may do either
		code  int
	}{
		{[]string{"CNI_CONTAINERID="}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_CONTAINERID=a/b"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_CONTAINERID=../../meta"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_CONTAINERID=a b"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_CONTAINERID=a\nb"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_CONTAINERID=\x1b[2J"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_CONTAINERID=c\xff"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_CONTAINERID=%2e%2e"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_CONTAINERID=" + strings.Repeat("c", 256)}, []string{"ADD", "CHECK"}, codeEnvironment},
		{[]string{"CNI_CONTAINERID=" + long}, []string{"ADD", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME="}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME=eth0/1"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME=eth0:1"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME=.."}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME=eth 0"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME=sixteen-letters-"}, []string{"ADD", "DEL", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME=eth\xff"}, []string{"ADD", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME=\x1b[2J"}, []string{"ADD", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME=eth0\u202e"}, []string{"ADD", "CHECK"}, codeEnvironment},
		{[]string{"CNI_IFNAME=\u0085"}, []string{"ADD", "CHECK"}, codeEnvironment},
		{[]string{"CNI_NETNS="}, []string{"ADD", "CHECK"}, codeEnvironment},
		{[]string{"CNI_PATH="}, allVerbs, codeEnvironment},
		{[]string{"CNI_COMMAND=add"}, allVerbs, codeEnvironment},
		{[]string{"CNI_COMMAND=\x1b[2J"}, allVerbs, codeEnvironment},
		{[]string{"CNI_COMMAND=ADD\n"}, allVerbs, codeEnvironment},
		{[]string{"CNI_ARGS=x"}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=x=y"}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=\x1b[2J=\xff"}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=IP=\x1b[2J"}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=IP=" + long}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=;;;=;=;"}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=IgnoreUnknown=\xff"}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=K8S_POD_NAME=" + strings.Repeat("p", 600)}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=K8S_POD_NAME=" + long}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=K8S_POD_NAME=p\xff"}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=K8S_POD_NAMESPACE=n\xff;K8S_POD_NAME=p"}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=K8S_POD_UID=\xff\xfe"}, []string{"ADD"}, codeEnvironment},
		{[]string{"CNI_ARGS=K8S_POD_UID=" + strings.Repeat("u", 2000)}, []string{"ADD"}, codeEnvironment},
	} {
		for _, verb := range allVerbs {
			r := n.raw(verb, stdin, x.env...)
			r.what = fmt.Sprintf("%s with %.60q", verb, x.env)
			switch {
			case slices.Contains(x.verbs, verb):
				r.one(x.code)
			case r.exit != 0:
				r.one(codeEnvironment, codeConfig, codeNetns, codeMismatch)
			}
		}
	}
	c.unchanged(before)

	// What is odd and can be written down is: in one line, in ASCII, and back.
	pod := "n%/\t\n\x1b[2J\u202e\u0085\"\\"
	n.call("ADD", "odd", w, "CNI_ARGS=K8S_POD_NAMESPACE=shop;K8S_POD_NAME="+pod+";K8S_POD_UID=%s%n").ok()
	n.call("ADD", "odd", w, "TRACEPARENT=00-\x1b-\xff-01").ok()
	r := c.ledger("log", "-o", "json", "--op", "acquire", "-n", "1").ok()
	var l struct{ Pod, PodUID, Trace string }
	if err := json.Unmarshal([]byte(r.stdout), &l); err != nil || l.Pod != "shop/"+pod || l.PodUID != "%s%n" || l.Trace != "" {
		t.Errorf("the ledger says %+v (%v)", l, err)
	}
	n.call("DEL", "odd", w).ok()
	c.wantLeased("10.1.0.2")
}

// put is what a plain client does.
func (c *cluster) put(key, value string) {
	c.t.Helper()
	c.etcdctl(func(ctx context.Context, client *clientv3.Client) error {
		_, err := client.Put(ctx, key, value)
		return err
	})
}

func (c *cluster) drop(key string) {
	c.t.Helper()
	c.etcdctl(func(ctx context.Context, client *clientv3.Client) error {
		_, err := client.Delete(ctx, key)
		return err
	})
}

func (c *cluster) etcdctl(f func(ctx context.Context, client *clientv3.Client) error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	client, err := clientv3.New(c.etcd.Config(c.t))
	if err != nil {
		c.t.Fatal(err)
	}
	defer client.Close()
	if err := f(ctx, client); err != nil {
		c.t.Fatal(err)
	}
}

// calm checks what a command wrote: no panic, and nothing that a terminal would
// take for an order.
func (r *reply) calm() *reply {
	r.t.Helper()
	yaml := strings.HasSuffix(r.what, " yaml") // its strings hold what is no control character as it is
	for _, out := range []string{r.stdout, r.stderr} {
		if strings.Contains(out, "panic") || strings.Contains(out, "goroutine ") {
			r.t.Errorf("%s panicked:\n%s", r.what, out)
		}
		if i := strings.IndexFunc(out, func(c rune) bool { return c != '\n' && unicode.IsControl(c) || c == '\u202e' && !yaml }); i >= 0 {
			r.t.Errorf("%s writes a control character: %.200q", r.what, out[max(0, i-60):])
		}
		if len(out) > 256<<10 {
			r.t.Errorf("%s writes %d bytes: %.300s…", r.what, len(out), out)
		}
	}
	if r.exit < 0 || r.exit > 3 {
		r.t.Errorf("%s: exit status %d\n%s%s", r.what, r.exit, r.stdout, r.stderr)
	}
	return r
}

// readers are the commands that only read.
func (n *node) readers() [][]string {
	return [][]string{
		{"show"},
		{"show", "--blocks", "--leases"},
		{"show", "-o", "json"},
		{"ip", "10.1.0.2"},
		{"ip", "10.1.0.2", "-o", "wide"},
		{"ip", "10.1.0.2", "-o", "name"},
		{"ip", "10.1.0.2", "--at", "-1s"},
		{"log"},
		{"log", "-o", "wide"},
		{"log", "-o", "yaml"},
		{"verify"},
		{"verify", "-o", "json", "--all-signatures"},
		{"keys", "list"},
		{"keys", "export"},
		{"node", "list"},
		{"doctor", "--node", n.name, "--state-dir", n.state},
		{"queue", "list", "--node", n.name, "--state-dir", n.state},
	}
}

// published is the first state that 'ledger publish' would send to bars.
func (c *cluster) published() []byte {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := c.ledgerCommand("publish", "--print", "--source", "test")
	cmd = exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
	cmd.Env = c.ledgerCommand().Env
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	cancel()
	_ = cmd.Wait()
	if err != nil {
		c.t.Errorf("ledger publish --print: %v\n%s", err, stderr.String())
	}
	if strings.Contains(stderr.String(), "panic") {
		c.t.Errorf("ledger publish panicked:\n%s", stderr.String())
	}
	return line
}

// TestHostileStore is a sample, through the programs and a real etcd, of what
// package allocator and audit test at length.
func TestHostileStore(t *testing.T) {
	c := newCluster(t)
	c.unverified = true // each key is put right again, but its revisions tell
	n, other := c.node("n1"), c.node("n2")
	w := subnet("10.1.0.0/24")
	escape := "shop\x1b[2J\u202e"
	n.call("ADD", "c1", w, "CNI_ARGS=K8S_POD_NAMESPACE=n;K8S_POD_NAME="+escape+";K8S_POD_UID=<b>"+escape).ok()
	n.call("ADD", "c2", w).ok()
	other.call("ADD", "d1", w).want("10.1.0.16/24")
	id := keyspace.AttachmentID{Node: "n1", Network: "net", Container: "c1", Interface: "eth0"}
	var writer keyspace.Writer
	who := entry.Writer{Kind: entry.KindNode, Name: "n1"}
	if err := keyspace.Decode(c.kvs(keys.Writer(who))[keys.Writer(who)], &writer); err != nil {
		t.Fatal(err)
	}
	address := keys.Address("default", netip.MustParseAddr("10.1.0.2"))
	evil := `{"\u001b[2J":"` + "\x1b]0;owned\x07" + `"}`
	for _, x := range []struct {
		name, key, value string
		again            int // the code of ADD for c1; 0: it succeeds
		fresh            int // the code of ADD for a new container
		verify           int
	}{
		{"a stop of escapes", keys.Stop("n2"), string(keyspace.Encode(keyspace.Stop{Node: "n2", Found: "\x1b[2J\nline\u202e", Time: time.Date(2026, 11, 20, 14, 0, 0, 0, time.UTC)})), 0, codeIntegrity, 0},
		{"a stop that is spelt otherwise", keys.Stop("n2"), `{"node":"n2","found":"` + `\u001b[2J\nline\u202e` + `","time":"2026-11-20T14:00:00Z"}`, 0, codeIntegrity, 1},
		{"a pod's name with escapes", keys.Prefix() + "zzz", "x", 0, 0, 1},
		{"a key of escapes", keys.Prefix() + "\x1b[2J\u202e\xff", evil, 0, 0, 1},
		{"an attachment of escapes", keys.Attachment(id) + "\x1b[2J", evil, 0, 0, 1},
		{"meta of nothing", keys.Meta(), "null", codeIntegrity, codeIntegrity, 1},
		{"meta of escapes", keys.Meta(), evil, codeIntegrity, codeIntegrity, 1},
		{"a stop of nothing", keys.Stops() + "\x1b[2J", "", 0, codeIntegrity, 1},
		{"a pool of escapes", keys.Pool("p"), `{"ranges":[],"exclude":["\u001b[2J"]}`, 0, 0, 1},
		{"an address of nothing", address, "", codeIntegrity, 0, 1},
		{"an address of 1 MiB", address, strings.Repeat("a", 1<<20), codeIntegrity, 0, 1},
		{"an address of somebody with escapes", address, `{"state":"leased","pool":"net","holder":{"node":"\u001b[2J","network":"\u202e","container":"x","interface":"\u0007"},"acquire":"` + writer.Head().String() + `"}`, codeIntegrity, 0, 1},
		{"an attachment of nothing", keys.Attachment(id), "{}", codeIntegrity, 0, 1},
		{"an attachment of 1 MiB", keys.Attachment(id), `"` + strings.Repeat("a", 1<<20), codeIntegrity, 0, 1},
		{"a block of escapes", keys.Block(keyspace.BlockID{Space: "default", Pool: "net", Prefix: netip.MustParsePrefix("10.1.0.32/28")}), `{"node":"\u001b[2J\u202e","claim":"` + writer.Head().String() + `"}`, 0, 0, 1},
		{"a writer of nothing", keys.Writer(who), "{}", codeIntegrity, codeIntegrity, 1},
		{"a writer of escapes", keys.Writer(who), evil, codeIntegrity, codeIntegrity, 1},
		{"another writer of escapes", keys.Writer(entry.Writer{Kind: entry.KindOperator, Name: "x"}), strings.Replace(string(keyspace.Encode(writer)), `"machine":"`, `"machine":"\u001b[2J\u202e`, 1), 0, 0, 1},
		{"an entry of escapes", keys.Entry(who, writer.Chain, 2), "\x1b[2J\n\u202e", 0, 0, 1},
		{"the next entry", "", evil, codeIntegrity, codeIntegrity, 1},
	} {
		t.Run(x.name, func(t *testing.T) {
			cc := &cluster{t: t, etcd: c.etcd, dir: c.dir}
			m, o := *n, *other
			m.cluster, o.cluster = cc, cc
			if x.key == "" {
				x.key = keys.Entry(who, writer.Chain, writer.Seq+1)
			}
			old, was := cc.kvs(x.key)[x.key]
			cc.put(x.key, x.value)
			if got := cc.ledger("verify").calm(); got.exit != x.verify {
				t.Errorf("ledger verify: exit status %d, want %d\n%s%s", got.exit, x.verify, got.stdout, got.stderr)
			}
			for _, args := range m.readers() {
				cc.ledger(args...).calm()
			}
			var state struct{ Pools []any }
			if line := cc.published(); json.Unmarshal(line, &state) != nil || bytes.ContainsAny(line, "\x1b\x07") {
				t.Errorf("published: %.500q", line)
			}
			code := func(r *reply, want int) {
				t.Helper()
				if want == 0 {
					r.ok()
				} else {
					r.one(want)
				}
				for _, out := range []string{r.stderr, r.stdout} {
					if strings.ContainsFunc(out, func(c rune) bool { return c != '\n' && c != '\t' && unicode.IsControl(c) }) {
						t.Errorf("%s writes a control character: %q", r.what, out)
					}
				}
			}
			again := m.call("ADD", "c1", w)
			code(again, x.again)
			if again.exit == 0 {
				again.want("10.1.0.2/24")
			}
			code(m.call("ADD", "fresh", w), x.fresh)
			code(m.call("CHECK", "c2", w.with(`"prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.3/24"}]}`)), map[bool]int{true: x.fresh, false: 0}[x.fresh != 0 && x.again != 0])
			m.call("DEL", "fresh", w).ok()
			m.call("DEL", "unknown", w).ok()
			if was {
				cc.put(x.key, string(old))
			} else {
				cc.drop(x.key)
			}
			// What is put right works as before, and nothing was lost.
			m.call("ADD", "c1", w).want("10.1.0.2/24")
			o.call("ADD", "d1", w).want("10.1.0.16/24")
			if m.queue() > 0 {
				m.ledger("queue", "flush").ok()
			}
			cc.wantLeased("10.1.0.2", "10.1.0.3", "10.1.0.16")
			if err := keyspace.Decode(cc.kvs(keys.Writer(who))[keys.Writer(who)], &writer); err != nil {
				t.Fatal(err)
			}
		})
	}
}
