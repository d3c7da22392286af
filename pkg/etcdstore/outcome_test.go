package etcdstore_test

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
)

// What a commit's error says about it.
const (
	done       = "done"
	unknown    = "unknown"
	notApplied = "not applied"
	notHere    = "not applied, take another view"
	decided    = "decided"
)

func outcome(err error) string {
	not, dec := errors.Is(err, allocator.ErrNotApplied), errors.Is(err, allocator.ErrDecided)
	switch {
	case err == nil:
		return done
	case not && dec:
		return "contradiction"
	case not && errors.Is(err, allocator.ErrReconnected):
		return notHere
	case not:
		return notApplied
	case dec:
		return decided
	}
	return unknown
}

// answer is an error as etcd's server sends it, and what it has to mean.
type answer struct {
	sent error
	want string
}

// etcdAnswers are all that etcd has a name for.
var etcdAnswers = map[string]answer{
	"ErrGRPCEmptyKey":                      {rpctypes.ErrGRPCEmptyKey, notApplied},
	"ErrGRPCKeyNotFound":                   {rpctypes.ErrGRPCKeyNotFound, unknown},
	"ErrGRPCValueProvided":                 {rpctypes.ErrGRPCValueProvided, unknown},
	"ErrGRPCLeaseProvided":                 {rpctypes.ErrGRPCLeaseProvided, unknown},
	"ErrGRPCTooManyOps":                    {rpctypes.ErrGRPCTooManyOps, notApplied},
	"ErrGRPCDuplicateKey":                  {rpctypes.ErrGRPCDuplicateKey, notApplied},
	"ErrGRPCInvalidClientAPIVersion":       {rpctypes.ErrGRPCInvalidClientAPIVersion, unknown},
	"ErrGRPCInvalidSortOption":             {rpctypes.ErrGRPCInvalidSortOption, unknown},
	"ErrGRPCCompacted":                     {rpctypes.ErrGRPCCompacted, unknown},
	"ErrGRPCFutureRev":                     {rpctypes.ErrGRPCFutureRev, unknown},
	"ErrGRPCNoSpace":                       {rpctypes.ErrGRPCNoSpace, decided},
	"ErrGRPCLeaseNotFound":                 {rpctypes.ErrGRPCLeaseNotFound, unknown},
	"ErrGRPCLeaseExist":                    {rpctypes.ErrGRPCLeaseExist, unknown},
	"ErrGRPCLeaseTTLTooLarge":              {rpctypes.ErrGRPCLeaseTTLTooLarge, unknown},
	"ErrGRPCWatchCanceled":                 {rpctypes.ErrGRPCWatchCanceled, unknown},
	"ErrGRPCMemberExist":                   {rpctypes.ErrGRPCMemberExist, unknown},
	"ErrGRPCPeerURLExist":                  {rpctypes.ErrGRPCPeerURLExist, unknown},
	"ErrGRPCMemberNotEnoughStarted":        {rpctypes.ErrGRPCMemberNotEnoughStarted, unknown},
	"ErrGRPCMemberBadURLs":                 {rpctypes.ErrGRPCMemberBadURLs, unknown},
	"ErrGRPCMemberNotFound":                {rpctypes.ErrGRPCMemberNotFound, unknown},
	"ErrGRPCMemberNotLearner":              {rpctypes.ErrGRPCMemberNotLearner, unknown},
	"ErrGRPCLearnerNotReady":               {rpctypes.ErrGRPCLearnerNotReady, unknown},
	"ErrGRPCTooManyLearners":               {rpctypes.ErrGRPCTooManyLearners, unknown},
	"ErrGRPCClusterIDMismatch":             {rpctypes.ErrGRPCClusterIDMismatch, unknown},
	"ErrGRPCRequestTooLarge":               {rpctypes.ErrGRPCRequestTooLarge, notApplied},
	"ErrGRPCRequestTooManyRequests":        {rpctypes.ErrGRPCRequestTooManyRequests, notApplied},
	"ErrGRPCRootUserNotExist":              {rpctypes.ErrGRPCRootUserNotExist, unknown},
	"ErrGRPCRootRoleNotExist":              {rpctypes.ErrGRPCRootRoleNotExist, unknown},
	"ErrGRPCUserAlreadyExist":              {rpctypes.ErrGRPCUserAlreadyExist, unknown},
	"ErrGRPCUserEmpty":                     {rpctypes.ErrGRPCUserEmpty, notApplied},
	"ErrGRPCUserNotFound":                  {rpctypes.ErrGRPCUserNotFound, unknown},
	"ErrGRPCRoleAlreadyExist":              {rpctypes.ErrGRPCRoleAlreadyExist, unknown},
	"ErrGRPCRoleNotFound":                  {rpctypes.ErrGRPCRoleNotFound, unknown},
	"ErrGRPCRoleEmpty":                     {rpctypes.ErrGRPCRoleEmpty, unknown},
	"ErrGRPCAuthFailed":                    {rpctypes.ErrGRPCAuthFailed, notApplied},
	"ErrGRPCPermissionNotGiven":            {rpctypes.ErrGRPCPermissionNotGiven, unknown},
	"ErrGRPCPermissionDenied":              {rpctypes.ErrGRPCPermissionDenied, notApplied},
	"ErrGRPCRoleNotGranted":                {rpctypes.ErrGRPCRoleNotGranted, unknown},
	"ErrGRPCPermissionNotGranted":          {rpctypes.ErrGRPCPermissionNotGranted, unknown},
	"ErrGRPCAuthNotEnabled":                {rpctypes.ErrGRPCAuthNotEnabled, unknown},
	"ErrGRPCInvalidAuthToken":              {rpctypes.ErrGRPCInvalidAuthToken, notApplied},
	"ErrGRPCInvalidAuthMgmt":               {rpctypes.ErrGRPCInvalidAuthMgmt, unknown},
	"ErrGRPCAuthOldRevision":               {rpctypes.ErrGRPCAuthOldRevision, notHere},
	"ErrGRPCNoLeader":                      {rpctypes.ErrGRPCNoLeader, notHere},
	"ErrGRPCNotLeader":                     {rpctypes.ErrGRPCNotLeader, unknown},
	"ErrGRPCLeaderChanged":                 {rpctypes.ErrGRPCLeaderChanged, unknown},
	"ErrGRPCNotCapable":                    {rpctypes.ErrGRPCNotCapable, unknown},
	"ErrGRPCStopped":                       {rpctypes.ErrGRPCStopped, unknown},
	"ErrGRPCTimeout":                       {rpctypes.ErrGRPCTimeout, unknown},
	"ErrGRPCTimeoutDueToLeaderFail":        {rpctypes.ErrGRPCTimeoutDueToLeaderFail, unknown},
	"ErrGRPCTimeoutDueToConnectionLost":    {rpctypes.ErrGRPCTimeoutDueToConnectionLost, unknown},
	"ErrGRPCTimeoutWaitAppliedIndex":       {rpctypes.ErrGRPCTimeoutWaitAppliedIndex, unknown},
	"ErrGRPCUnhealthy":                     {rpctypes.ErrGRPCUnhealthy, unknown},
	"ErrGRPCCorrupt":                       {rpctypes.ErrGRPCCorrupt, unknown},
	"ErrGRPCNotSupportedForLearner":        {rpctypes.ErrGRPCNotSupportedForLearner, notHere},
	"ErrGRPCBadLeaderTransferee":           {rpctypes.ErrGRPCBadLeaderTransferee, unknown},
	"ErrGRPCWrongDowngradeVersionFormat":   {rpctypes.ErrGRPCWrongDowngradeVersionFormat, unknown},
	"ErrGRPCInvalidDowngradeTargetVersion": {rpctypes.ErrGRPCInvalidDowngradeTargetVersion, unknown},
	"ErrGRPCClusterVersionUnavailable":     {rpctypes.ErrGRPCClusterVersionUnavailable, unknown},
	"ErrGRPCDowngradeInProcess":            {rpctypes.ErrGRPCDowngradeInProcess, unknown},
	"ErrGRPCNoInflightDowngrade":           {rpctypes.ErrGRPCNoInflightDowngrade, unknown},
	"ErrGRPCCanceled":                      {rpctypes.ErrGRPCCanceled, unknown},
	"ErrGRPCDeadlineExceeded":              {rpctypes.ErrGRPCDeadlineExceeded, unknown},
}

// otherAnswers have no name of etcd's, with codes that named ones have.
var otherAnswers = map[string]answer{
	"raft dropped it":            {status.Error(codes.Unknown, "raft proposal dropped"), unknown},
	"another InvalidArgument":    {status.Error(codes.InvalidArgument, "etcdserver: something new"), unknown},
	"another PermissionDenied":   {status.Error(codes.PermissionDenied, "by a proxy"), unknown},
	"another Unauthenticated":    {status.Error(codes.Unauthenticated, "by a proxy"), unknown},
	"another ResourceExhausted":  {status.Error(codes.ResourceExhausted, "grpc: received message larger than max"), unknown},
	"another Unavailable":        {status.Error(codes.Unavailable, "transport is closing"), unknown},
	"its own deadline":           {status.Error(codes.DeadlineExceeded, "context deadline exceeded"), unknown},
	"its own context":            {status.Error(codes.Canceled, "context canceled"), unknown},
	"no status, but etcd's text": {rpctypes.ErrTooManyRequests, notApplied}, // as etcd's util.go sends it
}

// TestOutcomes: what each answer that etcd has means for a commit. One that a
// new version of etcd brings is unknown, and this test asks for a decision.
func TestOutcomes(t *testing.T) {
	t.Parallel()
	if got, want := slices.Sorted(maps.Keys(etcdAnswers)), rpctypesErrors(t); !slices.Equal(got, want) {
		t.Errorf("this test knows\n%s\nand rpctypes has\n%s", strings.Join(got, " "), strings.Join(want, " "))
	}
	all := maps.Clone(otherAnswers)
	maps.Copy(all, etcdAnswers)
	for name, c := range all {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := &answers{refuse: c.sent}
			s := etcdstore.New(etcdstore.Config{Endpoints: []string{serve(t, a)}})
			defer s.Close()
			if _, err := s.Read(t.Context(), false, []allocator.Get{{Key: "k"}}); err != nil {
				t.Fatal(err)
			}
			a.left.Store(1 << 20)
			before := a.asked.Load()
			_, err := s.Commit(t.Context(), allocator.Txn{Then: []allocator.Write{{Key: "k"}}})
			if got := outcome(err); got != c.want {
				t.Errorf("%v: %s, want %s (%v)", c.sent, got, c.want, err)
			}
			if c.want == unknown && a.asked.Load() != before+1 {
				t.Errorf("%v: sent %d times", c.sent, a.asked.Load()-before)
			}
			if got := errors.Is(err, allocator.ErrNoSpace); got != (name == "ErrGRPCNoSpace") {
				t.Errorf("%v: out of space: %v", err, got)
			}
		})
	}
}

// rpctypesErrors are the names of the errors that etcd's server may answer, in
// order, from the source of the version that is built with.
func rpctypesErrors(t *testing.T) (names []string) {
	t.Helper()
	dir, err := exec.Command("go", "list", "-f", "{{.Dir}}", "go.etcd.io/etcd/api/v3/v3rpc/rpctypes").Output()
	if err != nil {
		t.Fatal(err)
	}
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(string(bytes.TrimSpace(dir)), "error.go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range file.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.VAR {
			continue
		}
		for _, spec := range g.Specs {
			v := spec.(*ast.ValueSpec)
			for i, name := range v.Names {
				if _, alias := v.Values[i].(*ast.Ident); strings.HasPrefix(name.Name, "ErrGRPC") && !alias {
					names = append(names, name.Name)
				}
			}
		}
	}
	slices.Sort(names)
	return names
}

// TestOutcomesAreDocumented: docs/etcd.md has each answer that does not leave the
// outcome unknown, and what it means.
func TestOutcomesAreDocumented(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../docs/etcd.md")
	if err != nil {
		t.Fatal(err)
	}
	inDoc := map[string]string{notApplied: "not done", notHere: "not done", decided: "**done or not**"}
	for name, c := range etcdAnswers {
		text := "| `" + status.Convert(c.sent).Message() + "` |"
		i := bytes.Index(doc, []byte(text))
		if (i >= 0) != (c.want != unknown) {
			t.Errorf("%s is %s; in the table: %v", name, c.want, i >= 0)
		}
		if i < 0 {
			continue
		}
		row, _, _ := strings.Cut(string(doc[i:]), "\n")
		if !strings.HasSuffix(row, "| "+inDoc[c.want]+" |") {
			t.Errorf("%s is %s, and the table says %s", name, c.want, row)
		}
	}
}

// connect is a store on a real etcd that has read, so that it may commit.
func connect(t *testing.T, e *etcdtest.Etcd) *etcdstore.Store {
	t.Helper()
	s := etcdstore.New(etcdstore.Config{Endpoints: []string{e.Endpoint()}})
	t.Cleanup(func() { s.Close() })
	has(t, s, "c")
	return s
}

func has(t *testing.T, s *etcdstore.Store, key string) bool {
	t.Helper()
	r, err := s.Read(t.Context(), false, []allocator.Get{{Key: key}})
	if err != nil {
		t.Error(err)
		return false
	}
	return len(r.Ranges[0].KVs) == 1
}

func creates(key string, value []byte) allocator.Txn {
	return allocator.Txn{If: []allocator.Compare{{Key: key}}, Then: []allocator.Write{{Key: key, Value: value}}}
}

// TestNotAppliedByEtcd: what a real etcd answers to commits that it refuses
// before it proposes them is not applied, and it is not there.
func TestNotAppliedByEtcd(t *testing.T) {
	e := etcdtest.Start(t)
	many := creates("many", nil)
	for i := range 128 {
		many.Then = append(many.Then, allocator.Write{Key: fmt.Sprint("many/", i)})
	}
	twice := creates("twice", nil)
	twice.Then = append(twice.Then, twice.Then[0])
	empty := creates("empty", nil)
	empty.Then = append(empty.Then, allocator.Write{})
	for want, txn := range map[error]allocator.Txn{
		rpctypes.ErrTooManyOps: many, rpctypes.ErrDuplicateKey: twice, rpctypes.ErrEmptyKey: empty,
		rpctypes.ErrRequestTooLarge: creates("large", make([]byte, 1600<<10)),
	} {
		s := connect(t, e)
		_, err := s.Commit(t.Context(), txn)
		if outcome(err) != notApplied || !errors.Is(err, want) {
			t.Errorf("%v, want %s: %v", err, notApplied, want)
		}
		if has(t, s, txn.Then[0].Key) {
			t.Errorf("%v, and it was applied", err)
		}
	}
}

// TestNoSpaceApplies: an etcd that runs out of space applies commits that it
// answers NOSPACE. A read right after the answer shows for good whether it did,
// and nothing that is called not applied is there.
func TestNoSpaceApplies(t *testing.T) {
	const workers, most = 32, 20
	var applied, refused int
	for range most {
		a, r := runOutOfSpace(t, workers)
		applied, refused = applied+a, refused+r
		if t.Failed() || applied > 0 && refused > 0 {
			break
		}
	}
	t.Logf("answered NOSPACE: %d were applied, %d were not", applied, refused)
	if !t.Failed() && (applied == 0 || refused == 0) {
		t.Errorf("%d members ran out of space: %d commits that NOSPACE answers were applied, and %d were not; want some of each", most, applied, refused)
	}
}

// runOutOfSpace has workers commit until etcd is full and each has been told so.
func runOutOfSpace(t *testing.T, workers int) (applied, refused int) {
	e := etcdtest.Start(t, func(o *etcdmember.Options) { o.Quota = 2 << 20 })
	value := bytes.Repeat([]byte("v"), 16<<10)
	type commit struct {
		key, outcome string
		there        bool // by a read on the same connection right after the answer
	}
	var mu sync.Mutex
	var commits []commit
	var wg sync.WaitGroup
	for w := range workers {
		s := connect(t, e)
		wg.Go(func() {
			for i := range 1000 {
				key := fmt.Sprintf("c/%d/%d", w, i)
				_, err := s.Commit(t.Context(), creates(key, value))
				c := commit{key, outcome(err), has(t, s, key)}
				mu.Lock()
				commits = append(commits, c)
				mu.Unlock()
				if err == nil {
					continue
				}
				if !errors.Is(err, allocator.ErrNoSpace) {
					t.Errorf("%s: %v", key, err)
				}
				return
			}
			t.Errorf("worker %d: 1000 commits, and etcd is not full", w)
		})
	}
	wg.Wait()
	last := connect(t, e)
	for _, c := range commits {
		there := has(t, last, c.key)
		if there != c.there {
			t.Errorf("%s (%s): there right after the answer: %v, and in the end: %v", c.key, c.outcome, c.there, there)
		}
		switch {
		case c.outcome == decided && there:
			applied++
		case c.outcome == decided:
			refused++
		case c.outcome == done && !there, c.outcome != done && there:
			t.Errorf("%s was answered %q; there: %v", c.key, c.outcome, there)
		}
	}
	return applied, refused
}

// TestAlarmRefuses: with the alarm NOSPACE raised and space left, commits get as
// far as being applied, and are not. They do not come back when it is disarmed.
func TestAlarmRefuses(t *testing.T) {
	e := etcdtest.Start(t)
	c := e.Client(t)
	alarm := func(action pb.AlarmRequest_AlarmAction) {
		t.Helper()
		m, err := c.MemberList(t.Context())
		if err == nil {
			_, err = pb.NewMaintenanceClient(c.ActiveConnection()).Alarm(t.Context(), &pb.AlarmRequest{
				Action: action, MemberID: m.Members[0].ID, Alarm: pb.AlarmType_NOSPACE,
			})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s := connect(t, e)
	alarm(pb.AlarmRequest_ACTIVATE)
	for range 3 {
		_, err := s.Commit(t.Context(), creates("c", nil))
		if outcome(err) != decided || !errors.Is(err, allocator.ErrNoSpace) || !strings.Contains(err.Error(), e.Endpoint()) {
			t.Errorf("a commit with the alarm raised: %v; want %s, out of space, and where, on a connection that is kept", err, decided)
		}
	}
	if has(t, s, "c") {
		t.Error("it was applied")
	}
	// What only deletes needs no space.
	if _, err := s.Commit(t.Context(), allocator.Txn{Then: []allocator.Write{{Key: "c", Delete: true}}}); err != nil {
		t.Error(err)
	}
	alarm(pb.AlarmRequest_DEACTIVATE)
	if _, err := c.Put(t.Context(), "other", ""); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Get(t.Context(), "", clientv3.WithPrefix(), clientv3.WithKeysOnly()); err != nil || len(r.Kvs) != 1 {
		t.Errorf("after it was disarmed there are %v, %v; want only the other key", r.Kvs, err)
	}
}
