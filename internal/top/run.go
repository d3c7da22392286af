package top

import (
	"context"
	"io"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// Config is what Run needs.
type Config struct {
	Etcd    etcdstore.Config
	Keys    keyspace.Keys
	Timeout time.Duration // of one request
	Options
	Input  io.Reader // nil: the terminal
	Output io.Writer
	Clock  func() time.Time

	options []tea.ProgramOption // for tests
	drawn   func(string)        // for tests: called with each view
}

// program is the model as bubbletea drives it.
type program struct {
	ctx   context.Context
	m     *Model
	feed  *feed
	clock func() time.Time
	drawn func(string)
}

// tick is a second that passed.
type tick time.Time

func (p *program) Init() tea.Cmd {
	return tea.Batch(p.second(), tea.RequestBackgroundColor)
}

func (p *program) second() tea.Cmd {
	return tea.Tick(time.Second, func(time.Time) tea.Msg { return tick(p.clock()) })
}

func (p *program) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.KeyPressMsg:
		if msg.String() == "ctrl+z" {
			return p, tea.Suspend
		}
		return p, p.do(Key{msg.String(), msg.Text})
	case tea.PasteMsg:
		return p, p.do(Key{"paste", msg.Content})
	case tea.WindowSizeMsg:
		return p, p.do(Resized{msg.Width, msg.Height})
	case tea.BackgroundColorMsg:
		return p, p.do(Background{msg.IsDark()})
	case tick:
		return p, tea.Batch(p.do(Tick{time.Time(msg)}), p.second())
	case Loaded, Changes, Found, Lost, Certificate, Note, Verifying, Verified, History:
		return p, p.do(msg)
	}
	return p, nil
}

// do updates the model and turns what it asks for into commands, which run
// beside the drawing.
func (p *program) do(ev Event) tea.Cmd {
	var cmds []tea.Cmd
	for _, ask := range p.m.Update(ev) {
		switch ask := ask.(type) {
		case Quit:
			return tea.Quit
		case AskVerify:
			cmds = append(cmds, func() tea.Msg { return p.feed.verify(p.ctx) })
		case AskHistory:
			cmds = append(cmds, func() tea.Msg { return p.feed.history(p.ctx, place{ask.Space, ask.IP}, ask.Newest) })
		}
	}
	return tea.Batch(cmds...)
}

func (p *program) View() tea.View {
	content := p.m.View(p.m.width, p.m.height)
	if p.drawn != nil {
		p.drawn(content)
	}
	v := tea.NewView(content)
	v.AltScreen = true
	v.WindowTitle = "ledger top"
	return v
}

// Run shows the dashboard until somebody quits or ctx ends.
func Run(ctx context.Context, c Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if c.Now.IsZero() {
		c.Now = c.Clock()
	}
	f := &feed{cfg: c.Etcd, keys: c.Keys, patience: c.Timeout, now: c.Clock}
	p := &program{ctx: ctx, m: New(c.Options), feed: f, clock: c.Clock, drawn: c.drawn}
	options := append([]tea.ProgramOption{tea.WithContext(ctx), tea.WithOutput(c.Output), tea.WithoutSignalHandler(), tea.WithFPS(30)}, c.options...)
	if c.Input != nil {
		options = append(options, tea.WithInput(c.Input))
	}
	t := tea.NewProgram(p, options...)
	f.send = func(ev Event) { t.Send(ev) }
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.run(ctx)
	}()
	_, err := t.Run()
	cancel()
	<-done
	return err
}
