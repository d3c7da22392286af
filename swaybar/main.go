// Command ledger-swaybar shows in a bar how full the address pools are, whether
// the ledger verifies, and how old that knowledge is.
//
//	ledger-swaybar [--format i3bar|waybar|i3status-rust|text] [--source NAME] [--config FILE]
//	ledger-swaybar check-config [--config FILE] [--example]
//
// It is fed by `ledger publish` over Sway IPC, and knows neither etcd nor its
// credentials.
//
// # Guarantees
//
// It never shows as fine what it does not know. It is waiting, without a
// publisher, without sway, or shows the last numbers as stale, with their age;
// numbers are marked as unknown as soon as the publisher says that it has lost
// etcd, or has missed three heartbeats by the wall clock.
//
// It does not exit because of an error: a bar does not start its status command
// again. What is wrong, its own configuration included, is shown. It exits at
// once when told to (SIGTERM, SIGINT, SIGHUP), and when its bar is gone: nobody
// reads its output any more, or the process that started it has ended.
//
// It reads clicks however fast they come, and a slow bar does not slow it down:
// lines that the bar did not take are replaced by the newest. A bar that is
// hidden does not stop it.
//
// What comes over Sway IPC can come from any program in the session. It is
// bounded, cleaned of control characters and escaped, and reaches a command as
// a variable of its environment only.
//
// SIGUSR1 switches between the summary and one block for each pool, and SIGUSR2
// verifies now, for bars that send no clicks.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/ipam-ledger/ipam-ledger/swaybar/ipc"
)

// version is set by the linker.
var version string

const usage = `usage: ledger-swaybar [options]        run, as a bar's status command
       ledger-swaybar check-config     check the configuration

options:
  --format NAME   i3bar (swaybar; the default), waybar, i3status-rust or text
  --source NAME   show this cluster alone
  --config FILE   instead of ~/.config/ipam-ledger/swaybar.toml
  --version
check-config:
  --example       print a configuration with every option, and do not check
`

func main() {
	// One thread at a time does, and spares idle ones the search for work. Without
	// the collector's clock, an idle block does nothing at all; the limit starts it
	// when memory is needed.
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// memoryLimit is of Go's memory; the program's text comes on top.
const memoryLimit = 6 << 20

// run runs the command and returns its exit status.
func run(args []string, stdout, stderr io.Writer) int {
	check := len(args) > 0 && args[0] == "check-config"
	if check {
		args = args[1:]
	}
	flags := flag.NewFlagSet("ledger-swaybar", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	var (
		format      = flags.String("format", "", "")
		source      = flags.String("source", "", "")
		file        = flags.String("config", "", "")
		showExample = flags.Bool("example", false, "")
		showVersion = flags.Bool("version", false, "")
	)
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return 0
	case err == nil && flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case err == nil && *showExample && !check:
		err = errors.New("--example is for check-config")
	}
	if err != nil {
		fmt.Fprintf(stderr, "ledger-swaybar: error: %v\n%s", err, usage)
		return 2
	}
	if *showVersion {
		fmt.Fprintln(stdout, "ledger-swaybar", version)
		return 0
	}
	if *showExample {
		fmt.Fprint(stdout, example)
		return 0
	}

	path := *file
	if path == "" {
		path = configPath(os.Getenv)
	}
	config, problem := load(path, *file != "")
	over := config
	if *format != "" {
		over.Format = *format
	}
	if *source != "" {
		over.Source = *source
	}
	if err := over.validate(); err != nil { // of the flags: the file's have passed
		fmt.Fprintf(stderr, "ledger-swaybar: error: %v\n", err)
		return 2
	}
	if check {
		return checkConfig(path, &config, problem, stdout, stderr)
	}
	return serve(&over, problem)
}

// checkConfig says what is wrong with a configuration.
func checkConfig(path string, c *Config, problem error, stdout, stderr io.Writer) int {
	if problem != nil {
		fmt.Fprintf(stderr, "ledger-swaybar: error: %v\n", problem)
		return 1
	}
	if _, err := os.Stat(path); err != nil {
		fmt.Fprintf(stdout, "%s: absent, so every option has its default\n", path)
	} else {
		fmt.Fprintf(stdout, "%s: fine\n", path)
	}
	for _, command := range [][]string{c.Clicks.Left, c.Clicks.Middle, c.Clicks.Right} {
		if len(command) == 0 {
			continue
		}
		if _, err := find(command[0], programDir()); err != nil {
			fmt.Fprintf(stdout, "warning: clicks run %q: %v\n", strings.Join(command, " "), err)
		}
	}
	return 0
}

func programDir() string {
	path, err := os.Executable()
	if err != nil {
		return "/usr/local/bin"
	}
	return filepath.Dir(path)
}

// serve is the block at work, on stdin and stdout.
func serve(config *Config, problem error) int {
	gone, err := dieWithParent()
	if gone {
		return 0
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	out := newLines(os.Stdout, config.Format)
	b := newBar(config, programDir(), out)
	defer b.end()
	if err != nil {
		problem = errors.Join(problem, err)
	}
	if problem != nil {
		b.view.Problem = problem.Error()
	}

	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2)
	signal.Ignore(syscall.SIGPIPE) // the failed write tells
	go func() {
		for s := range signals {
			switch s {
			case syscall.SIGUSR1:
				b.in.put(func(l *letter) { l.toggle = !l.toggle })
			case syscall.SIGUSR2:
				b.in.put(func(l *letter) { l.clicks = addClick(l.clicks, click{Button: buttonMiddle}) })
			default:
				cancel()
			}
		}
	}()
	go func() {
		_ = out.run() // whatever the error: the bar is gone
		cancel()
	}()
	go func() {
		readerGone(syscall.Stdout)
		cancel()
	}()
	if config.Format == formatI3bar {
		go readClicks(os.Stdin, b.clicks)
	}

	f := &follower{
		in: b.in, source: config.Source, sockets: ipc.Sockets, silence: silence,
		open:    openBus,
		runtime: os.Getenv("XDG_RUNTIME_DIR"), said: b.view.Link,
	}
	f.readFiles()
	go f.run(ctx)

	timer, err := newAlarm()
	if err == nil {
		defer timer.close()
		err = b.loop(ctx, timer)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "ledger-swaybar: error: %v\n", err)
		return 1
	}
	return 0
}

func openBus(path string) ipc.Bus { return ipc.Open(path) }

// clicks puts a click into the inbox.
func (b *bar) clicks(c click) {
	b.in.put(func(l *letter) {
		if c.Button == buttonUp || c.Button == buttonDown {
			l.scroll = c.Button
		} else {
			l.clicks = addClick(l.clicks, c)
		}
	})
}
