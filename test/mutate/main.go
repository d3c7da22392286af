// Mutate puts mistakes into the code, one at a time, and says whether the tests of
// the package notice:
//
//	go run ./test/mutate -run '^M23$'
//
// The mistakes are written by hand, in mutations.txt, whose head says how. Each is
// compiled in by an overlay and tested in a copy, so that the tree is not touched.
// A mistake that no test notices is a guarantee that no test holds.
//
// It exits with 1 where a mistake was not noticed, does not fit the code any more or
// does not compile, and with 2 where it could not try.
package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const listName = "test/mutate/mutations.txt"

//go:embed mutations.txt
var list string

// mutation is one mistake.
type mutation struct {
	line       int // of the list
	id         string
	pkg, file  string
	breaks     string // which guarantee
	equivalent string // why no test can notice it
	old, new   string
}

var idForm = regexp.MustCompile(`^[A-Z][A-Za-z]*[0-9]+$`)

// parse reads a list of mutations.
func parse(text string) ([]mutation, error) {
	var out []mutation
	lineOf := map[string]int{}
	var m *mutation
	var olds, news []string
	n := 0
	fail := func(at int, format string, args ...any) ([]mutation, error) {
		return nil, fmt.Errorf("%s:%d: %s", listName, at, fmt.Sprintf(format, args...))
	}
	for line := range strings.SplitSeq(text+"\n", "\n") {
		n++
		switch {
		case m == nil && line == "", m == nil && strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "##"):
		case m == nil:
			rest, ok := strings.CutPrefix(line, "## ")
			f := strings.Split(rest, " ")
			if !ok || len(f) != 3 {
				return fail(n, "%.80q: want ## ID PACKAGE FILE, or a comment", line)
			}
			m = &mutation{line: n, id: f[0], pkg: f[1], file: f[2]}
			if !idForm.MatchString(m.id) {
				return fail(n, "ID %q: want letters and a number, as M23", m.id)
			}
			if first := lineOf[m.id]; first != 0 {
				return fail(n, "%s is in line %d already", m.id, first)
			}
			lineOf[m.id] = n
			if !fs.ValidPath(m.pkg) || filepath.Base(m.file) != m.file || !strings.HasSuffix(m.file, ".go") || strings.HasSuffix(m.file, "_test.go") {
				return fail(n, "%s/%s: want a package's folder, and a file of its code", m.pkg, m.file)
			}
		case line == "":
			m.old, m.new = strings.Join(olds, "\n"), strings.Join(news, "\n")
			switch {
			case m.breaks == "":
				return fail(m.line, "%s lacks the line that says what it breaks", m.id)
			case strings.TrimSpace(m.old) == "":
				return fail(m.line, "%s lacks a text to replace (-)", m.id)
			case m.old == m.new:
				return fail(m.line, "%s changes nothing", m.id)
			}
			out = append(out, *m)
			m, olds, news = nil, nil, nil
		case m.breaks == "":
			if strings.ContainsAny(line[:1], "-+#") || strings.HasPrefix(line, "equivalent:") {
				return fail(n, "%s: %.80q: want the line that says what it breaks", m.id, line)
			}
			m.breaks = line
		case line[0] == '-' && len(news) == 0:
			olds = append(olds, line[1:])
		case line[0] == '+' && len(olds) > 0:
			news = append(news, line[1:])
		case strings.HasPrefix(line, "equivalent: ") && len(olds) == 0 && m.equivalent == "":
			m.equivalent = strings.TrimPrefix(line, "equivalent: ")
		default:
			return fail(n, "%s: %.80q: want what it breaks, then equivalent: WHY if it is, then - lines, then + lines, then an empty line", m.id, line)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: there is no mutation in it", listName)
	}
	return out, nil
}

// apply returns the file with the mistake in it.
func (m *mutation) apply(root string) ([]byte, error) {
	name := filepath.Join(m.pkg, m.file)
	src, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		return nil, fmt.Errorf("%s:%d: %s: %w", listName, m.line, m.id, err)
	}
	if n := strings.Count(string(src), m.old); n != 1 {
		return nil, fmt.Errorf("%s:%d: %s: its text occurs %d times in %s, want once: move it to where the code is now, with more lines around it if need be", listName, m.line, m.id, n, name)
	}
	mutant := strings.Replace(string(src), m.old, m.new, 1)
	if _, err := parser.ParseFile(token.NewFileSet(), name, mutant, parser.SkipObjectResolution); err != nil {
		return nil, fmt.Errorf("%s:%d: %s: %w", listName, m.line, m.id, err)
	}
	return []byte(mutant), nil
}

// Outcomes of a try. Those in capitals are what is looked for.
const (
	killed     = "killed"
	timeout    = "timeout" // noticed, too: a hang ends in a red test
	equivalent = "equivalent"
	survived   = "SURVIVED"
	notApplied = "DOES NOT APPLY"
	notBuilt   = "DOES NOT BUILD"
)

func good(outcome string) bool {
	return outcome == killed || outcome == timeout || outcome == equivalent
}

// result is what became of one mutation.
type result struct {
	outcome string
	by      string // the test that noticed
	took    time.Duration
	output  string
	err     error // it could not be tried
}

// try runs a package's tests, with a mutation or as they are.
func try(ctx context.Context, root, pkg string, m *mutation, limit time.Duration) (r result) {
	tmp, err := os.MkdirTemp("", "mutate-")
	if err != nil {
		return result{err: err}
	}
	defer os.RemoveAll(tmp)
	overlay := map[string]map[string]string{"Replace": {}}
	if m != nil {
		mutant, err := m.apply(root)
		if err != nil {
			return result{outcome: notApplied, output: err.Error()}
		}
		instead := filepath.Join(tmp, m.file)
		if err := os.WriteFile(instead, mutant, 0o600); err != nil {
			return result{err: err}
		}
		overlay["Replace"][filepath.Join(root, pkg, m.file)] = instead
	}
	replace, err := json.Marshal(overlay)
	if err == nil {
		err = os.WriteFile(filepath.Join(tmp, "overlay.json"), replace, 0o600)
	}
	if err != nil {
		return result{err: err}
	}
	tests := filepath.Join(tmp, "tests")
	// Without vet: what is asked is whether a test notices.
	build := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-overlay", filepath.Join(tmp, "overlay.json"), "-o", tests, "./"+pkg)
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return result{outcome: notBuilt, output: string(out), err: ctx.Err()}
	}
	tree := filepath.Join(tmp, "tree")
	if err := copyTree(root, tree); err != nil {
		return result{err: err}
	}
	// The tests' own limit names the test that hangs; ours is for one that even that
	// does not end.
	tctx, cancel := context.WithTimeout(ctx, limit+time.Minute)
	defer cancel()
	run := exec.CommandContext(tctx, tests, "-test.v", "-test.failfast", "-test.timeout", limit.String())
	run.Dir = filepath.Join(tree, pkg)
	run.Env = environment(os.Environ())
	run.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	run.Cancel = func() error { return syscall.Kill(-run.Process.Pid, syscall.SIGKILL) }
	// To a file: a pipe would wait for whatever process a test left behind.
	out, err := os.Create(filepath.Join(tmp, "output"))
	if err != nil {
		return result{err: err}
	}
	defer out.Close()
	run.Stdout, run.Stderr = out, out
	start := time.Now()
	err = run.Run()
	r.took = time.Since(start)
	printed, rerr := os.ReadFile(out.Name())
	if rerr != nil {
		return result{err: rerr}
	}
	r.output = string(printed)
	exit := new(exec.ExitError)
	switch {
	case ctx.Err() != nil:
		r.err = ctx.Err()
	case err == nil && m != nil && m.equivalent != "":
		r.outcome = equivalent
	case err == nil:
		r.outcome = survived
	case tctx.Err() != nil || strings.Contains(r.output, "panic: test timed out after"):
		r.outcome, r.by = timeout, noticed(r.output)
	case errors.As(err, &exit):
		r.outcome, r.by = killed, noticed(r.output)
	default:
		r.err = err
	}
	return r
}

// environment is what the tests run in. Random tests do not save failing runs, and
// do not look for the shortest: what they printed is not kept.
func environment(of []string) []string {
	env := slices.DeleteFunc(slices.Clone(of), func(s string) bool {
		return strings.HasPrefix(s, "RAPID_") || strings.HasPrefix(s, "IPAM_LEDGER_FULL=")
	})
	return append(env, "RAPID_NOFAILFILE=true", "RAPID_SHRINKTIME=1ms")
}

// copyTree copies the module, as tests read files of other packages. What earlier
// runs of random tests saved stays behind: a replay of it would notice by luck.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		switch {
		case err != nil:
			return err
		case rel == ".git" && !d.IsDir():
			return nil
		case rel == ".git", rel == "bin", strings.HasSuffix(rel, filepath.Join("testdata", "rapid")):
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		case !d.Type().IsRegular():
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o600)
	})
}

// noticed is the first test that failed, or the last that was begun.
func noticed(output string) string {
	var failed, begun string
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "--- FAIL: "); ok {
			name, _, _ := strings.Cut(rest, " ")
			if failed == "" || strings.HasPrefix(name, failed+"/") {
				failed = name
			}
		} else if rest, ok := strings.CutPrefix(line, "=== RUN "); ok {
			begun = strings.TrimSpace(rest)
		}
	}
	if failed != "" {
		return failed
	}
	return begun
}

// tryAll tries mutations, n at a time, and writes the table. It reports whether all
// were noticed.
func tryAll(ctx context.Context, root string, mm []mutation, n int, limit time.Duration, w io.Writer) (bool, error) {
	const width = 36
	row := fmt.Sprintf("%%-5s %%-16s %%-14s %%7s  %%-%ds %%s\n", width)
	fmt.Fprintf(w, row, "ID", "PACKAGE", "OUTCOME", "SECONDS", "NOTICED BY", "WHAT IT BREAKS")
	var packages []string
	for i := range mm {
		if !slices.Contains(packages, mm[i].pkg) {
			packages = append(packages, mm[i].pkg)
		}
	}
	limits := map[string]time.Duration{}
	for _, pkg := range packages {
		// Tests that fail anyway notice everything, and where the machine is slow all hang.
		r := try(ctx, root, pkg, nil, limit)
		if r.err != nil {
			return false, r.err
		}
		if r.outcome != survived {
			return false, fmt.Errorf("the tests of %s fail as they are (%s %s):\n%s", pkg, r.outcome, r.by, r.output)
		}
		limits[pkg] = max(limit, 4*r.took)
		fmt.Fprintf(w, row, "-", pkg, "passes", fmt.Sprintf("%.1f", r.took.Seconds()), "-", "nothing: without a mutation")
	}

	ctx, cancel := context.WithCancel(ctx)
	results := make([]chan result, len(mm))
	for i := range results {
		results[i] = make(chan result, 1)
	}
	todo := make(chan int)
	var workers sync.WaitGroup
	for range n {
		workers.Go(func() {
			for i := range todo {
				results[i] <- try(ctx, root, mm[i].pkg, &mm[i], limits[mm[i].pkg])
			}
		})
	}
	go func() {
		for i := range mm {
			todo <- i
		}
		close(todo)
	}()
	defer workers.Wait()
	defer cancel()
	missed := map[string][]string{}
	count := map[string]map[string]int{}
	ok := true
	for i := range mm {
		m, r := &mm[i], <-results[i]
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if r.err != nil {
			return false, fmt.Errorf("%s: %w", m.id, r.err)
		}
		by, what := r.by, m.breaks
		if by == "" {
			by = "-"
		} else if len(by) > width {
			by = by[:width-2] + ".."
		}
		if r.outcome == equivalent {
			what += " (" + m.equivalent + ")"
		}
		fmt.Fprintf(w, row, m.id, m.pkg, r.outcome, fmt.Sprintf("%.1f", r.took.Seconds()), by, what)
		if r.outcome == notApplied || r.outcome == notBuilt {
			fmt.Fprintf(w, "      %s\n", strings.ReplaceAll(strings.TrimSpace(r.output), "\n", "\n      "))
		}
		if count[m.pkg] == nil {
			count[m.pkg] = map[string]int{}
		}
		count[m.pkg][r.outcome]++
		if !good(r.outcome) {
			ok = false
			missed[m.pkg] = append(missed[m.pkg], m.id)
		}
	}
	fmt.Fprintln(w)
	for _, pkg := range packages {
		c := count[pkg]
		fmt.Fprintf(w, "%-16s %d noticed, %d equivalent, %d not noticed, %d to be mended", pkg,
			c[killed]+c[timeout], c[equivalent], c[survived], c[notApplied]+c[notBuilt])
		if missed[pkg] != nil {
			fmt.Fprintf(w, ": %s", strings.Join(missed[pkg], " "))
		}
		fmt.Fprintln(w)
	}
	return ok, nil
}

// memory is how much a process may take: a mutant that loops may well fill a list.
const memory = 6 << 30

func main() {
	only := flag.String("run", "", "only mutations whose ID this regular expression matches")
	show := flag.Bool("list", false, "list the mutations and do nothing")
	check := flag.Bool("check", false, "only check that each mutation fits the code")
	n := flag.Int("j", 1, "how many at a time")
	limit := flag.Duration("timeout", 3*time.Minute, "for a package's tests; where they take long without a mutation, four times that")
	out := flag.String("out", "", "also write the table to this file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	ok, err := mutate(ctx, *only, *show, *check, *n, *limit, *out)
	switch {
	case ctx.Err() != nil:
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(2)
	case !ok:
		os.Exit(1)
	}
}

func mutate(ctx context.Context, only string, show, check bool, n int, limit time.Duration, out string) (ok bool, err error) {
	if flag.NArg() > 0 || n < 1 || limit <= 0 {
		return false, errors.New("want flags alone, -j of 1 or more and a time; see -help")
	}
	ids, err := regexp.Compile(only)
	if err != nil {
		return false, err
	}
	mm, err := parse(list)
	if err != nil {
		return false, err
	}
	mm = slices.DeleteFunc(mm, func(m mutation) bool { return !ids.MatchString(m.id) })
	if len(mm) == 0 {
		return false, fmt.Errorf("no mutation's ID matches %q; see -list", only)
	}
	mod, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return false, fmt.Errorf("go env GOMOD: %w", err)
	}
	root := filepath.Dir(strings.TrimSpace(string(mod)))
	switch {
	case show:
		for _, m := range mm {
			fmt.Printf("%-5s %-16s %-12s %s\n", m.id, m.pkg, m.file, m.breaks)
		}
		return true, nil
	case check:
		ok = true
		for i := range mm {
			if _, err := mm[i].apply(root); err != nil {
				fmt.Println(err)
				ok = false
			}
		}
		return ok, nil
	}
	// The Go tools and the tests inherit it.
	if err := syscall.Setrlimit(syscall.RLIMIT_DATA, &syscall.Rlimit{Cur: memory, Max: memory}); err != nil {
		return false, fmt.Errorf("limiting memory to %d bytes: %w", memory, err)
	}
	w := io.Writer(os.Stdout)
	if out != "" {
		f, cerr := os.Create(out)
		if cerr != nil {
			return false, cerr
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		w = io.MultiWriter(w, f)
	}
	return tryAll(ctx, root, mm, n, limit, w)
}
