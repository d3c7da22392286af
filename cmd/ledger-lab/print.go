package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// page writes what the demo shows. The first failed write is kept: who closed
// the pipe wants no more of the demo.
type page struct {
	w      io.Writer
	colour bool
	step   int
	err    error
}

// colourWanted follows no-color.org.
func colourWanted(f *os.File) bool {
	return term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

func (p *page) write(s string) {
	if p.err == nil {
		_, p.err = io.WriteString(p.w, s)
	}
}

func (p *page) paint(code, s string) string {
	if !p.colour {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// title starts a step: what happens, and what it proves.
func (p *page) title(what, proves string) {
	p.step++
	p.write(fmt.Sprintf("\n%s\n   %s\n\n",
		p.paint("1", fmt.Sprintf("%d. %s", p.step, what)),
		p.paint("32", "Proves: "+proves)))
}

// command shows a command line as one would type it.
func (p *page) command(line string) { p.write(p.paint("36", "$ "+line) + "\n") }

// say writes a line.
func (p *page) say(format string, args ...any) {
	p.write(strings.TrimRight(fmt.Sprintf(format, args...), "\n") + "\n")
}
