package audit

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync"

	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// findings gathers what is wrong, from several goroutines.
type findings struct {
	mu       sync.Mutex
	list     []Finding
	groups   map[group][]int // of the list, by whom and what they are about
	most     int             // no group has more
	codes    map[Code]int    // of the list
	count    int64
	byCode   map[Code]int64
	badSigs  map[string]bool // where BAD-SIGNATURE was said already
	warnings []Finding
	warned   int64
	notes    []string
	doubts   map[Code][]Finding // undecided; decide says which they are
	doubtful map[Code]int64
	folded   map[Code]int64
	sigs     int64
}

// group is of whom and what findings are. One writer with a thousand of one kind
// must not hide what others have done.
type group struct {
	writer string
	code   Code
}

func newFindings() *findings {
	return &findings{
		groups: map[group][]int{}, most: MaxFindings, codes: map[Code]int{}, byCode: map[Code]int64{}, badSigs: map[string]bool{},
		doubts: map[Code][]Finding{}, doubtful: map[Code]int64{}, folded: map[Code]int64{},
	}
}

// own gives a finding memory of its own: what it was made of is reused. A key is as
// long as whoever puts it likes.
func (f *Finding) own() Finding {
	c := *f
	for _, s := range []*string{&c.Where, &c.Writer, &c.Detail, &c.Want, &c.Got} {
		if *s = strings.Clone((*s)[:min(len(*s), maxText)]); len(*s) == maxText {
			*s += "…"
		}
	}
	return c
}

// maxText is how much of a text a finding has, in bytes.
const maxText = 2048

// keep lists a finding. Where the list is full, the group with most in it gives a
// place to one with fewer.
func (l *findings) keep(f *Finding) {
	g := group{f.Writer, f.Code}
	if len(l.list) < MaxFindings {
		o := f.own()
		g.writer = o.Writer
		l.groups[g] = append(l.groups[g], len(l.list))
		l.codes[f.Code]++
		l.list = append(l.list, o)
		return
	}
	// First each kind gets its share, then each writer of the kind.
	from := f.Code
	for c, n := range l.codes {
		if n > l.codes[from] || n == l.codes[from] && from != f.Code && c < from {
			from = c
		}
	}
	if l.codes[f.Code]+1 >= l.codes[from] {
		from = f.Code
		if len(l.groups[g])+1 >= l.most {
			return
		}
	}
	var largest group
	l.most = 0
	for x, at := range l.groups {
		l.most = max(l.most, len(at))
		if n := len(l.groups[largest]); x.code == from && (len(at) > n || len(at) == n && x.writer < largest.writer) {
			largest = x
		}
	}
	at := l.groups[largest]
	if from == f.Code && len(l.groups[g])+1 >= len(at) {
		return
	}
	i := at[len(at)-1]
	l.groups[largest] = at[:len(at)-1]
	if len(at) == 1 {
		delete(l.groups, largest)
	}
	l.codes[from]--
	l.codes[f.Code]++
	l.list[i] = f.own()
	g.writer = l.list[i].Writer
	l.groups[g] = append(l.groups[g], i)
	l.most = max(l.most, len(l.groups[g]))
}

func (l *findings) add(f *Finding) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f.Code == BadSignature {
		if l.badSigs[f.Where] {
			return
		}
		if len(l.badSigs) < 4*MaxFindings {
			l.badSigs[strings.Clone(f.Where)] = true
		}
	}
	l.count++
	l.byCode[f.Code]++
	l.keep(f)
}

// doubt saves what is a finding, unless the ledger is of a newer version: then
// entries that this program does not know may explain it.
func (l *findings) doubt(f *Finding) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.doubtful[f.Code]++
	if len(l.doubts[f.Code]) < MaxFindings {
		l.doubts[f.Code] = append(l.doubts[f.Code], f.own())
	}
}

// decide makes the doubts findings or, in a ledger of a newer version, counts them.
func (l *findings) decide(newer bool) {
	if newer {
		l.folded = l.doubtful
		delete(l.folded, UnknownEntry) // the report counts those by themselves
		return
	}
	for code, list := range l.doubts {
		for i := range list {
			l.add(&list[i])
		}
		more := l.doubtful[code] - int64(len(list))
		l.count += more
		l.byCode[code] += more
	}
}

func (l *findings) warn(f *Finding) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.warned++
	if len(l.warnings) < MaxFindings {
		l.warnings = append(l.warnings, f.own())
	}
}

func (l *findings) note(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notes = append(l.notes, fmt.Sprintf(format, args...))
}

func (l *findings) checked(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sigs += int64(n)
}

// checkSigs does a batch's signature tasks.
func (l *findings) checkSigs(tasks []sigTask) {
	for i := range tasks {
		l.checkSig(tasks[i].it, tasks[i].key)
	}
	l.checked(len(tasks))
}

func (l *findings) checkSig(it *item, key note.Verifier) {
	if holds(it.val, &it.e.Signature, key, key.Name()) {
		return
	}
	l.add(&Finding{
		Code: BadSignature, Where: it.key, Writer: it.writer, Chain: it.chain.String(), Seq: it.seq, Revision: it.mod, order: it.ord,
		Detail: notInForce, Want: keyName(key), Got: sigGot(&it.e.Signature, key),
	})
}

// Verify checks a whole ledger. It returns an error only if it could not check:
// what is wrong with what it could read is in the Report.
func Verify(ctx context.Context, src Source, o Options) (*Report, error) {
	snap := src.Snapshot()
	keys, err := keyspace.New(snap.Prefix)
	if err != nil {
		return nil, err
	}
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	batches := newBatchPool(6*o.Workers + 4)

	read := func(log *findings, second *moved) (*replay, error) {
		r := newReplay(keys, snap, &o, log)
		r.second = second
		work := func(b *batch) {
			for i := range b.items[:b.n] {
				b.items[i].parseEntry(r.prefix, keys, b.buf)
			}
		}
		sigs := make(chan *batch, o.Workers)
		var wg sync.WaitGroup
		for range o.Workers {
			wg.Go(func() {
				for b := range sigs {
					log.checkSigs(b.sigs)
					batches.put(b)
				}
			})
		}
		var seen int64
		err := each(ctx, o.Workers, src.Entries, work, func(b *batch) bool {
			r.batch(b)
			seen += int64(b.n)
			if o.Progress != nil {
				o.Progress(seen)
			}
			if len(b.sigs) == 0 {
				return true
			}
			sigs <- b
			return false
		}, batches)
		close(sigs)
		wg.Wait()
		if err != nil {
			return nil, fmt.Errorf("reading entries: %w", err)
		}
		return r, nil
	}
	log := newFindings()
	r, err := read(log, nil)
	if err == nil && r.again {
		m := r.moved
		m.arrange()
		log = newFindings()
		r, err = read(log, m)
	}
	if err != nil {
		return nil, err
	}
	last := &batch{}
	r.finish(last)
	log.checkSigs(last.sigs)
	r.checkTips(o.Workers)

	d := newDiff(r)
	// The same workers, another work: the replay is over, and each live key
	// touches what no other key touches.
	if err := each(ctx, o.Workers, d.ordered(src.State), d.work, func(*batch) bool { return true }, batches); err != nil {
		return nil, fmt.Errorf("reading live keys: %w", err)
	}
	if r.entries == 0 && d.count.Load() == 0 {
		return nil, fmt.Errorf("nothing below %s: not initialised, or the wrong prefix or etcd", snap.Prefix)
	}
	d.finish()
	if a, ok := src.(interface{ archiveFindings() []Finding }); ok {
		for _, f := range a.archiveFindings() {
			f.order = math.MaxInt64
			log.add(&f)
		}
	}
	return r.reportOf(d, &o), nil
}

// checkTips checks the signature of every chain's last entry, which covers
// what is below it.
func (r *replay) checkTips(workers int) {
	tips := make(chan *chain, workers)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for c := range tips {
				r.log.checked(1)
				if !holds(c.stored, &c.sigOf, c.key, c.w.name) {
					r.log.add(&Finding{
						Code: BadSignature, Where: c.keyOf(c.seq), Writer: c.w.name, Chain: c.id.String(), Seq: c.seq, Revision: c.mod,
						Detail: "the chain's last entry is not signed by the key in force", Want: keyName(c.key), Got: sigGot(&c.sigOf, c.key),
						order: math.MaxInt64,
					})
				}
			}
		})
	}
	for _, c := range r.chains {
		if c.key != nil && c.parsed && c.signed != c.seq {
			tips <- c
		}
	}
	close(tips)
	wg.Wait()
}

// earlier orders findings as what they are about was read.
func earlier(a, b Finding) int {
	return cmp.Or(cmp.Compare(a.order, b.order), strings.Compare(a.Where, b.Where), strings.Compare(string(a.Code)+a.Detail, string(b.Code)+b.Detail))
}

func (r *replay) reportOf(d *diff, o *Options) *Report {
	l := r.log
	p := &Report{
		Snapshot: r.snap, Cluster: r.cluster, Epoch: r.meta.Epoch, State: string(r.meta.State),
		First: r.first, Last: r.last, Entries: r.entries, Chains: int64(len(r.chains)), Writers: int64(len(r.writers)),
		Leased: r.leased, Free: int64(len(r.addrs)) - r.leased, Attachments: r.live, Blocks: int64(len(r.blocks)),
		Signatures: l.sigs, AllSignatures: o.AllSignatures, Pinned: o.Keys != nil, UnknownVersion: r.unknown,
		Findings: l.list, FindingCount: l.count, ByCode: l.byCode, Warnings: l.warnings, WarningCount: l.warned, Notes: l.notes,
	}
	if r.meta.set {
		p.Cluster = r.meta.Cluster
	}
	slices.SortStableFunc(p.Findings, earlier)
	if d.newer {
		p.Reduced = append(p.Reduced, fmt.Sprintf("meta is of version %d, and this program knows %d: use a newer 'ledger'", r.meta.Version, keyspace.FormatVersion))
	}
	if d.newer && r.unknown > 0 {
		p.Reduced = append(p.Reduced, fmt.Sprintf("%d entries are of a version or with an op that this program does not know: hash and signature were checked, they were not replayed", r.unknown))
	}
	if n := r.keyless(); n > 0 {
		p.Reduced = append(p.Reduced, fmt.Sprintf("%d chains were opened by an entry that this program does not know: with which key is not known, and their signatures were not checked", n))
	}
	if r.unvouched > 0 {
		p.Reduced = append(p.Reduced, fmt.Sprintf("%d entries after a gap are signed with keys that no entry gives: their signatures were not checked", r.unvouched))
	}
	if len(l.folded) > 0 {
		var cc []string
		for c, n := range l.folded {
			where := ""
			if list := l.doubts[c]; len(list) > 0 {
				where = " (" + slices.MinFunc(list, earlier).Where + ")"
			}
			cc = append(cc, fmt.Sprintf("%d %s%s", n, c, where))
		}
		sort.Strings(cc)
		p.Reduced = append(p.Reduced, "not judged, as entries that are not known may explain it: "+strings.Join(cc, ", "))
	}
	if p.Findings == nil {
		p.Findings = []Finding{}
	}
	return p
}
