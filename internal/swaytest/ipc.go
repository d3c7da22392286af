package swaytest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"
)

// Messages of Sway's IPC, sway-ipc(7).
const (
	runCommand = 0
	getOutputs = 3
	getTree    = 4
	sendTick   = 10
)

var magic = [6]byte{'i', '3', '-', 'i', 'p', 'c'}

// maxMessage bounds a reply. The tree of a test's desktop is far smaller.
const maxMessage = 16 << 20

// WriteMessage writes one message of Sway's IPC.
func WriteMessage(w io.Writer, kind uint32, payload []byte) error {
	b := append(make([]byte, 0, 14+len(payload)), magic[:]...)
	b = binary.NativeEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.NativeEndian.AppendUint32(b, kind)
	_, err := w.Write(append(b, payload...))
	return err
}

// ReadMessage reads one message of Sway's IPC.
func ReadMessage(r io.Reader) (kind uint32, payload []byte, err error) {
	var head [14]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.NativeEndian.Uint32(head[6:])
	switch {
	case [6]byte(head[:6]) != magic:
		return 0, nil, fmt.Errorf("sway IPC: message starts with %q", head[:6])
	case n > maxMessage:
		return 0, nil, fmt.Errorf("sway IPC: message of %d bytes", n)
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(r, payload)
	return binary.NativeEndian.Uint32(head[10:]), payload, err
}

// Dial connects to a sway. Its queue of connections is three long, and one that is
// full refuses at once (EAGAIN): then it is tried again.
func Dial(socket string) (c net.Conn, err error) {
	err = Until(func() (err error) {
		c, err = net.Dial("unix", socket)
		if err != nil && !errors.Is(err, syscall.EAGAIN) {
			return fatal{err}
		}
		return err
	})
	return c, err
}

// Ask sends one message on a connection of its own and decodes the reply.
func (d *Desktop) Ask(kind uint32, payload []byte, reply any) error {
	c, err := Dial(d.Socket())
	if err != nil {
		return fmt.Errorf("sway IPC: %w", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return fmt.Errorf("sway IPC: %w", err)
	}
	if err := WriteMessage(c, kind, payload); err != nil {
		return fmt.Errorf("sway IPC: %w", err)
	}
	got, b, err := ReadMessage(c)
	switch {
	case err != nil:
		return fmt.Errorf("sway IPC: reply to message %d: %w", kind, err)
	case got != kind:
		return fmt.Errorf("sway IPC: reply to message %d is of type %d", kind, got)
	}
	if err := json.Unmarshal(b, reply); err != nil {
		return fmt.Errorf("sway IPC: reply to message %d: %w", kind, err)
	}
	return nil
}

// Run runs a command of sway.
func (d *Desktop) Run(command string) error {
	var results []struct {
		Success bool
		Error   string
	}
	if err := d.Ask(runCommand, []byte(command), &results); err != nil {
		return err
	}
	for _, r := range results {
		if !r.Success {
			return fmt.Errorf("sway: %s: %s", command, r.Error)
		}
	}
	return nil
}

// Tick sends a tick to all who listen to ticks.
func (d *Desktop) Tick(payload []byte) error {
	var r struct{ Success bool }
	if err := d.Ask(sendTick, payload, &r); err != nil {
		return err
	}
	if !r.Success {
		return errors.New("sway refused a tick")
	}
	return nil
}

// Rect is a place on the output.
type Rect struct{ X, Y, Width, Height int }

// Window is a window.
type Window struct {
	AppID    string
	Title    string
	PID      int
	Floating bool
	Rect     Rect
}

type treeNode struct {
	Type     string
	Name     string
	PID      int
	AppID    string `json:"app_id"`
	Rect     Rect
	Nodes    []treeNode
	Floating []treeNode `json:"floating_nodes"`
}

// Windows are all windows.
func (d *Desktop) Windows() ([]Window, error) {
	var root treeNode
	if err := d.Ask(getTree, nil, &root); err != nil {
		return nil, err
	}
	var found []Window
	var walk func(n *treeNode)
	walk = func(n *treeNode) {
		if n.PID != 0 {
			found = append(found, Window{n.AppID, n.Name, n.PID, n.Type == "floating_con", n.Rect})
		}
		for _, below := range [][]treeNode{n.Nodes, n.Floating} {
			for i := range below {
				walk(&below[i])
			}
		}
	}
	walk(&root)
	return found, nil
}
