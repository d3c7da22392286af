package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/ipam-ledger/ipam-ledger/internal/swaytest"
)

// getBarConfig is the message of Sway's IPC that asks for a bar's configuration,
// or, without a payload, for the names of all bars.
const getBarConfig = 6

// barID is the name of our bar.
const barID = "ledger-lab"

// plainBar is what a bar of ours looks like on a desktop that has none.
const plainBar = `{
	"mode": "dock", "hidden_state": "hide", "position": "bottom", "font": "monospace 11",
	"gaps": {"top": 0, "right": 0, "bottom": 0, "left": 0}, "bar_height": 0,
	"status_padding": 1, "status_edge_padding": 3, "wrap_scroll": false, "workspace_buttons": false,
	"strip_workspace_numbers": false, "strip_workspace_name": false, "workspace_min_width": 0,
	"binding_mode_indicator": false, "verbose": false, "pango_markup": true, "tray_padding": 2,
	"colors": {
		"background": "#3b4252ff", "statusline": "#eceff4ff", "separator": "#7b88a1ff",
		"focused_background": "#3b4252ff", "focused_statusline": "#eceff4ff", "focused_separator": "#7b88a1ff",
		"focused_workspace_border": "#4c7899ff", "focused_workspace_bg": "#285577ff", "focused_workspace_text": "#ffffffff",
		"inactive_workspace_border": "#333333ff", "inactive_workspace_bg": "#222222ff", "inactive_workspace_text": "#888888ff",
		"active_workspace_border": "#333333ff", "active_workspace_bg": "#5f676aff", "active_workspace_text": "#ffffffff",
		"urgent_workspace_border": "#2f343aff", "urgent_workspace_bg": "#900000ff", "urgent_workspace_text": "#ffffffff",
		"binding_mode_border": "#2f343aff", "binding_mode_bg": "#900000ff", "binding_mode_text": "#ffffffff"
	}
}`

// barConfig is the configuration of our bar: that of the first bar the desktop
// has, so that it looks like the others, but below all and with our status
// command.
func barConfig(sway, status string) ([]byte, error) {
	config := map[string]any{}
	if err := json.Unmarshal([]byte(plainBar), &config); err != nil {
		return nil, err // a constant
	}
	var names []string
	if err := ask(sway, nil, &names); err != nil {
		return nil, err
	}
	if len(names) > 0 {
		if err := ask(sway, []byte(names[0]), &config); err != nil {
			return nil, err
		}
	}
	delete(config, "outputs") // all of them
	for k, v := range map[string]any{
		"id": barID, "status_command": status, "position": "bottom", "mode": "dock",
		"workspace_buttons": false, "tray_outputs": []string{"none"},
	} {
		config[k] = v
	}
	return json.Marshal(config)
}

// ask asks sway for the configuration of bars.
func ask(sway string, payload []byte, reply any) error {
	c, err := swaytest.Dial(sway)
	if err != nil {
		return fmt.Errorf("asking sway for its bars: %w", err)
	}
	defer c.Close()
	if err := swaytest.WriteMessage(c, getBarConfig, payload); err != nil {
		return fmt.Errorf("asking sway for its bars: %w", err)
	}
	_, b, err := swaytest.ReadMessage(c)
	if err == nil {
		err = json.Unmarshal(b, reply)
	}
	if err != nil {
		return fmt.Errorf("asking sway for its bars: %w", err)
	}
	return nil
}

// relayBar lets a swaybar of ours run on somebody's desktop without a change of
// its configuration, which sway takes from its file alone. It listens on a
// socket in dir, hands on what is said between swaybar and sway, and answers one
// question itself: how our bar is configured. stop ends it and all connections.
func relayBar(dir, sway, status string) (socket string, stop func() error, err error) {
	config, err := barConfig(sway, status)
	if err != nil {
		return "", nil, err
	}
	socket = filepath.Join(dir, "sway-for-bar.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return "", nil, fmt.Errorf("making a socket for swaybar: %w", err)
	}
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		open []io.Closer
	)
	wg.Go(func() {
		for {
			bar, err := l.Accept()
			if err != nil {
				return // closed by stop
			}
			to, err := swaytest.Dial(sway)
			if err != nil {
				bar.Close() // swaybar says that sway is gone
				continue
			}
			mu.Lock()
			open = append(open, bar, to)
			mu.Unlock()
			var writing sync.Mutex // answers to swaybar, whole
			wg.Go(func() {
				_ = handOn(bar, to, func(kind uint32, payload []byte) (bool, error) {
					if kind != getBarConfig || string(payload) != barID {
						return false, nil
					}
					writing.Lock()
					defer writing.Unlock()
					return true, swaytest.WriteMessage(bar, kind, config)
				})
				to.Close()
			})
			wg.Go(func() {
				_ = handOn(to, bar, func(kind uint32, payload []byte) (bool, error) {
					writing.Lock()
					defer writing.Unlock()
					return true, swaytest.WriteMessage(bar, kind, payload)
				})
				bar.Close()
			})
		}
	})
	return socket, func() error {
		err := l.Close()
		mu.Lock()
		for _, c := range open {
			_ = c.Close() // may be closed already
		}
		mu.Unlock()
		wg.Wait()
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}, nil
}

// handOn reads messages and writes those that take does not take. It returns
// when either side is gone.
func handOn(from io.Reader, to io.Writer, take func(kind uint32, payload []byte) (bool, error)) error {
	for {
		kind, payload, err := swaytest.ReadMessage(from)
		if err != nil {
			return err
		}
		taken, err := take(kind, payload)
		if err == nil && !taken {
			err = swaytest.WriteMessage(to, kind, payload)
		}
		if err != nil {
			return err
		}
	}
}
