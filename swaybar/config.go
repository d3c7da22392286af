package main

import (
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

//go:embed config.example.toml
var example string

// Config is the configuration file.
type Config struct {
	Format   string   `toml:"format"`
	Source   string   `toml:"source"`
	View     string   `toml:"view"`
	Pools    []string `toml:"pools"`
	MaxPools int      `toml:"max_pools"`
	Label    string   `toml:"label"`
	ASCII    bool     `toml:"ascii"`
	Severity struct {
		Warning     int `toml:"warning"`
		Critical    int `toml:"critical"`
		VerifyHours int `toml:"verify_hours"`
	} `toml:"severity"`
	Colors struct {
		Normal   string `toml:"normal"`
		Warning  string `toml:"warning"`
		Critical string `toml:"critical"`
		Unknown  string `toml:"unknown"`
	} `toml:"colors"`
	Clicks struct {
		Left          []string `toml:"left"`
		Middle        []string `toml:"middle"`
		Right         []string `toml:"right"`
		VerifySeconds int      `toml:"verify_seconds"`
		ResultSeconds int      `toml:"result_seconds"`
	} `toml:"clicks"`
}

// Views.
const (
	viewSummary = "summary"
	viewPools   = "pools"
)

// maxConfig is the most bytes of a configuration file.
const maxConfig = 1 << 16

func defaults() Config {
	c, err := parse(example, Config{})
	if err != nil {
		panic(err) // tested
	}
	return c
}

// parse reads a configuration over what applies where it is silent.
func parse(text string, c Config) (Config, error) {
	meta, err := toml.Decode(text, &c)
	var syntax toml.ParseError
	switch {
	case errors.As(err, &syntax):
		return c, fmt.Errorf("line %d: %s", syntax.Position.Line, syntax.Message)
	case err != nil:
		return c, errors.New(strings.TrimPrefix(err.Error(), "toml: "))
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return c, fmt.Errorf("unknown key %s: check-config --example shows all there are", unknown[0])
	}
	return c, c.validate()
}

func (c *Config) validate() error {
	within := func(key string, value, low, high int) error {
		if value < low || value > high {
			return fmt.Errorf("%s = %d: want %d to %d", key, value, low, high)
		}
		return nil
	}
	if c.Format == "i3status-rs" {
		c.Format = formatI3statusRust // both names are in use
	}
	if !slices.Contains(formats, c.Format) {
		return fmt.Errorf("format %.40q: want one of %s", c.Format, strings.Join(formats, ", "))
	}
	if c.View != viewSummary && c.View != viewPools {
		return fmt.Errorf("view %.40q: want summary or pools", c.View)
	}
	if len(c.Source) > state.MaxText || len(c.Label) > state.MaxText {
		return fmt.Errorf("source and label: at most %d bytes", state.MaxText)
	}
	for _, color := range []string{c.Colors.Normal, c.Colors.Warning, c.Colors.Critical, c.Colors.Unknown} {
		if !isColor(color) {
			return fmt.Errorf("color %.40q: want #RRGGBB, #RRGGBBAA or \"\"", color)
		}
	}
	for _, command := range [][]string{c.Clicks.Left, c.Clicks.Middle, c.Clicks.Right} {
		if len(command) > 0 && command[0] == "" {
			return errors.New("clicks: a command's program is empty; an empty list does nothing")
		}
	}
	return cmp.Or(
		within("max_pools", c.MaxPools, 1, 64),
		within("severity.warning", c.Severity.Warning, 1, 100),
		within("severity.critical", c.Severity.Critical, c.Severity.Warning, 101),
		within("severity.verify_hours", c.Severity.VerifyHours, 0, 24*366),
		within("clicks.verify_seconds", c.Clicks.VerifySeconds, 1, 86400),
		within("clicks.result_seconds", c.Clicks.ResultSeconds, 1, 3600),
	)
}

func isColor(s string) bool {
	digits, ok := strings.CutPrefix(s, "#")
	return s == "" || ok && (len(digits) == 6 || len(digits) == 8) && strings.Trim(digits, "0123456789abcdefABCDEF") == ""
}

func (c *Config) result() time.Duration { return time.Duration(c.Clicks.ResultSeconds) * time.Second }

// configPath is where the configuration is looked for.
func configPath(env func(string) string) string {
	dir := env("XDG_CONFIG_HOME")
	if dir == "" {
		dir = filepath.Join(env("HOME"), ".config")
	}
	return filepath.Join(dir, "ipam-ledger", "swaybar.toml")
}

// load reads a configuration file. One that nobody asked for may be absent. With
// an error come the defaults.
func load(path string, asked bool) (Config, error) {
	file, err := os.Open(path)
	if !asked && errors.Is(err, os.ErrNotExist) {
		return defaults(), nil
	}
	if err != nil {
		return defaults(), err
	}
	defer file.Close() // it was only read
	text, err := io.ReadAll(io.LimitReader(file, maxConfig+1))
	switch {
	case err != nil:
	case len(text) > maxConfig:
		err = fmt.Errorf("at most %d bytes", maxConfig)
	default:
		var c Config
		if c, err = parse(string(text), defaults()); err == nil {
			return c, nil
		}
	}
	return defaults(), fmt.Errorf("%s: %w", path, err)
}
