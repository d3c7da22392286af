package publish

import "time"

const (
	// quiet is the least time between two states, and so the time after which an
	// isolated change is sent at once: four a second, for sway handles each in the
	// thread that draws.
	quiet = 250 * time.Millisecond
	// MaxRate is how many states are sent in a second, hellos apart.
	MaxRate = int(time.Second / quiet)
	// helloPause is the least time between answers to hellos: when sway reloads
	// its configuration, all bars ask at once.
	helloPause = 100 * time.Millisecond
)

// cadence decides when a state is sent. It looks at no clock.
type cadence struct {
	heartbeat     time.Duration
	last          time.Time // sent
	dirty, wanted bool
	beat          time.Time // heartbeat due; zero: now
}

// changed: the state differs from what was sent.
func (c *cadence) changed(time.Time) { c.dirty = true }

// asked: a bar said hello.
func (c *cadence) asked(time.Time) { c.wanted = true }

// sent: a whole state was sent, which answers everything.
func (c *cadence) sent(now time.Time) {
	c.dirty, c.wanted = false, false
	c.last, c.beat = now, now.Add(c.heartbeat)
}

// due reports whether to send now and, if not, when to ask again. A clock that
// went back does not make it wait for longer than a heartbeat.
func (c *cadence) due(now time.Time) (send bool, next time.Time) {
	if c.last.IsZero() || now.Before(c.last) {
		return true, now.Add(c.heartbeat)
	}
	next = c.beat
	if c.dirty {
		next = c.last.Add(quiet)
	}
	if c.wanted && c.last.Add(helloPause).Before(next) {
		next = c.last.Add(helloPause)
	}
	return !now.Before(next), next
}
