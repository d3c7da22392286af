package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// The example has every option, with its default and a comment.
func TestExample(t *testing.T) {
	var keys func(prefix string, of reflect.Type)
	keys = func(prefix string, of reflect.Type) {
		for f := range of.Fields() {
			name := f.Tag.Get("toml")
			if name == "" {
				t.Errorf("%s has no name", f.Name)
			}
			if f.Type.Kind() == reflect.Struct {
				if !strings.Contains(example, "\n["+name+"]\n") {
					t.Errorf("no section %s", name)
				}
				keys(name+".", f.Type)
				continue
			}
			if !regexp.MustCompile(`(?m)^` + name + ` = `).MatchString(example) {
				t.Errorf("no option %s%s", prefix, name)
			}
		}
	}
	keys("", reflect.TypeFor[Config]())
	if c := defaults(); c.Severity.Critical == 0 || c.Clicks.Left == nil || c.Format != formatI3bar {
		t.Errorf("defaults %+v", c)
	}
}

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"":                           "",
		"format = 'i3status-rs'":     "",
		"colors.normal = '#00ff00'":  "",
		"clicks.left = []":           "",
		"form = 'x'":                 "unknown key form:",
		"[clicks]\nlef = []":         "unknown key clicks.lef:",
		"format = 'json'":            `format "json": want one of i3bar, waybar, i3status-rust, text`,
		"format = 7":                 "line 1",
		"format = ":                  "line 1: ",
		"view = 'x'":                 `view "x": want summary or pools`,
		"max_pools = 0":              "max_pools = 0: want 1 to 64",
		"severity.warning = 99":      "severity.critical = 95: want 99 to 101",
		"severity.verify_hours = -1": "severity.verify_hours = -1: want 0 to 8784",
		"colors.normal = 'red'":      `color "red": want #RRGGBB`,
		"colors.normal = '#12345g'":  `color "#12345g": want`,
		"clicks.left = ['']":         "clicks: a command's program is empty",
		"clicks.result_seconds = 0":  "clicks.result_seconds = 0: want 1 to 3600",
	} {
		_, err := parse(text, defaults())
		if got := ""; err != nil {
			got = err.Error()
			if want == "" || !strings.HasPrefix(got, want) {
				t.Errorf("%s: %s, want %s", text, got, want)
			}
		} else if want != "" {
			t.Errorf("%s: accepted, want %s", text, want)
		}
	}
}

func TestRun(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", dir)
	t.Setenv("PATH", "")
	file := filepath.Join(dir, "bad.toml")
	if err := os.WriteFile(file, []byte("view = 'x'"), 0o600); err != nil {
		t.Fatal(err)
	}
	version = "v0"
	for _, c := range []struct {
		args        string
		status      int
		out, errors string
	}{
		{"--version", 0, "ledger-swaybar v0\n", ""},
		{"--help", 0, "usage:", ""},
		{"--bogus", 2, "", "flag provided but not defined: -bogus\nusage:"},
		{"extra", 2, "", `unexpected argument "extra"`},
		{"--example", 2, "", "--example is for check-config"},
		{"--format json", 2, "", `format "json": want one of`},
		{"check-config --example", 0, example, ""},
		{"check-config", 0, "swaybar.toml: absent, so every option has its default\nwarning: clicks run \"foot", ""},
		{"check-config --config " + file, 1, "", file + ": view \"x\": want"},
		{"check-config --config " + file + "x", 1, "", file + "x: no such file"},
	} {
		var out, errors bytes.Buffer
		if got := run(strings.Fields(c.args), &out, &errors); got != c.status {
			t.Errorf("%s: status %d, want %d", c.args, got, c.status)
		}
		if !strings.Contains(out.String(), c.out) || c.out == "" && out.Len() > 0 {
			t.Errorf("%s: said %q, want %q", c.args, out.String(), c.out)
		}
		if !strings.Contains(errors.String(), c.errors) || c.errors == "" && errors.Len() > 0 {
			t.Errorf("%s: error %q, want %q", c.args, errors.String(), c.errors)
		}
	}
}
