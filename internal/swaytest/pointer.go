package swaytest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Button is a mouse button, as Linux numbers them.
type Button uint32

// The buttons of a mouse.
const (
	Left   Button = 0x110
	Right  Button = 0x111
	Middle Button = 0x112
)

// Objects of our connection. 1 is the display; a client chooses the others'
// numbers, but must use each next one before the one after it. A callback is
// gone when it has fired, so that one number serves all of them.
const (
	wlDisplay = iota + 1
	wlRegistry
	callback
	virtualPointers
	virtualPointer
)

// Requests of the Wayland protocol, and of wlr-virtual-pointer-unstable-v1.
const (
	displaySync        = 0
	displayGetRegistry = 1
	registryBind       = 0
	createPointer      = 0
	pointerMoveTo      = 1
	pointerButton      = 2
	pointerFrame       = 4
	pointerAxisSource  = 5
	pointerAxisStep    = 7
)

const pointerInterface = "zwlr_virtual_pointer_manager_v1"

// Pointer is a mouse on the desktop.
type Pointer struct {
	conn          net.Conn
	in            *bufio.Reader
	born          time.Time
	width, height int
	out           []byte
}

// Pointer is the desktop's mouse. When one of its methods returns, sway has acted,
// and whoever is below the pointer has been told. After a Restart it is another.
func (d *Desktop) Pointer() *Pointer { return d.pointer }

// plug plugs in a mouse.
func (d *Desktop) plug() (_ *Pointer, err error) {
	c, err := net.Dial("unix", d.Path(d.display()))
	if err != nil {
		return nil, fmt.Errorf("virtual pointer: %w", err)
	}
	defer func() {
		if err != nil {
			c.Close()
			err = fmt.Errorf("virtual pointer: %w", err)
		}
	}()
	p := &Pointer{
		conn: c, in: bufio.NewReader(c), born: time.Now(),
		width: d.opts.Width, height: d.opts.Height,
	}
	name := uint32(0)
	p.request(wlDisplay, displayGetRegistry, wlRegistry)
	err = p.roundTrip(func(object uint32, event uint16, body []byte) {
		// A global's name, its interface (length, text, zero byte), its version.
		if object == wlRegistry && event == 0 && len(body) >= 8 {
			if n := int(binary.NativeEndian.Uint32(body[4:])); n > 0 && n <= len(body)-8 && string(body[8:8+n-1]) == pointerInterface {
				name = binary.NativeEndian.Uint32(body)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	if name == 0 {
		return nil, errors.New("sway does not offer " + pointerInterface)
	}
	// bind: name, then interface and version of the new object, then its number.
	text := append([]byte(pointerInterface), 0)
	for len(text)%4 != 0 {
		text = append(text, 0)
	}
	words := []uint32{name, uint32(len(pointerInterface) + 1)}
	for i := 0; i < len(text); i += 4 {
		words = append(words, binary.NativeEndian.Uint32(text[i:]))
	}
	p.request(wlRegistry, registryBind, append(words, 1, virtualPointers)...)
	p.request(virtualPointers, createPointer, 0, virtualPointer)
	if err = p.roundTrip(nil); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Pointer) unplug() { _ = p.conn.Close() } // sway may be gone already

// Move puts the pointer somewhere.
func (p *Pointer) Move(x, y int) error {
	p.request(virtualPointer, pointerMoveTo, p.now(), uint32(x), uint32(y), uint32(p.width), uint32(p.height))
	return p.act()
}

// Click presses a button and lets it go.
func (p *Pointer) Click(b Button) error {
	for _, down := range []uint32{1, 0} {
		p.request(virtualPointer, pointerButton, p.now(), uint32(b), down)
		if err := p.act(); err != nil {
			return err
		}
	}
	return nil
}

// Scroll turns the wheel by one step, down or up.
func (p *Pointer) Scroll(down bool) error {
	step := int32(1)
	if !down {
		step = -1
	}
	const vertical, wheel = 0, 0
	p.request(virtualPointer, pointerAxisSource, wheel)
	p.request(virtualPointer, pointerAxisStep, p.now(), vertical, uint32(step*15<<8), uint32(step)) // 24.8 fixed point
	return p.act()
}

func (p *Pointer) act() error {
	p.request(virtualPointer, pointerFrame)
	if err := p.roundTrip(nil); err != nil {
		return fmt.Errorf("virtual pointer: %w", err)
	}
	return nil
}

func (p *Pointer) now() uint32 { return uint32(time.Since(p.born).Milliseconds()) }

// request puts a request of words into the next write.
func (p *Pointer) request(object uint32, opcode uint16, words ...uint32) {
	p.out = binary.NativeEndian.AppendUint32(p.out, object)
	p.out = binary.NativeEndian.AppendUint32(p.out, uint32(8+4*len(words))<<16|uint32(opcode))
	for _, w := range words {
		p.out = binary.NativeEndian.AppendUint32(p.out, w)
	}
}

// roundTrip sends the requests and waits until sway has handled them all. Events
// that come meanwhile go to on.
func (p *Pointer) roundTrip(on func(object uint32, event uint16, body []byte)) error {
	p.request(wlDisplay, displaySync, callback)
	out := p.out
	p.out = nil
	if err := p.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := p.conn.Write(out); err != nil {
		return err
	}
	for {
		object, event, body, err := p.event()
		switch {
		case err != nil:
			return err
		case object == wlDisplay && event == 0:
			return fmt.Errorf("sway says: protocol error %q", body)
		case object == callback:
			return nil
		case on != nil:
			on(object, event, body)
		}
	}
}

func (p *Pointer) event() (object uint32, event uint16, body []byte, err error) {
	var head [8]byte
	if _, err := io.ReadFull(p.in, head[:]); err != nil {
		return 0, 0, nil, err
	}
	word := binary.NativeEndian.Uint32(head[4:])
	n := int(word >> 16)
	if n < len(head) {
		return 0, 0, nil, fmt.Errorf("event of %d bytes", n)
	}
	body = make([]byte, n-len(head))
	if _, err := io.ReadFull(p.in, body); err != nil {
		return 0, 0, nil, err
	}
	return binary.NativeEndian.Uint32(head[:]), uint16(word), body, nil
}
