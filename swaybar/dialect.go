package main

import (
	"cmp"
	"encoding/json"
	"slices"
	"strings"
)

// Dialects.
const (
	formatI3bar        = "i3bar"
	formatWaybar       = "waybar"
	formatI3statusRust = "i3status-rust"
	formatText         = "text"
)

var formats = []string{formatI3bar, formatWaybar, formatI3statusRust, formatText}

// i3barHeader starts the infinite array. It goes out in one write together with
// the first line: a header in two writes makes swaybar show raw JSON. The signals
// are none, so that a hidden bar does not stop us: our subscription would
// overflow, and be cut.
const i3barHeader = `{"version":1,"click_events":true,"stop_signal":0,"cont_signal":0}` + "\n[\n"

// i3barName is what clicks on our blocks name.
const i3barName = "ipam-ledger"

// pango escapes text for bars that take it as markup.
var pango = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;", "'", "&#39;")

// encode writes a line in a dialect. Those of i3bar are elements of an array,
// which the header starts and which never ends.
func encode(format string, line *Line, colors map[Level]string) []byte {
	var value any
	switch format {
	case formatI3bar:
		value = i3bar(line, colors)
	case formatWaybar:
		value = waybar(line)
	case formatI3statusRust:
		value = i3statusRust(line)
	default:
		full, _ := joined(line)
		return append([]byte(full), '\n')
	}
	b, err := json.Marshal(value)
	if err != nil {
		panic(err) // of strings and numbers
	}
	return append(b, '\n')
}

type i3barBlock struct {
	Name      string `json:"name"`
	Instance  string `json:"instance"`
	FullText  string `json:"full_text"`
	ShortText string `json:"short_text"`
	Color     string `json:"color,omitempty"`
	Urgent    bool   `json:"urgent,omitempty"`
	Markup    string `json:"markup"`
}

func i3bar(line *Line, colors map[Level]string) []i3barBlock {
	blocks := make([]i3barBlock, len(line.Blocks))
	for i, b := range line.Blocks {
		blocks[i] = i3barBlock{
			Name: i3barName, Instance: b.Instance, FullText: pango.Replace(b.Full), ShortText: pango.Replace(cmp.Or(b.Short, b.Full)),
			Urgent: b.Urgent, Markup: "pango",
		}
		if !b.Urgent { // then the bar's own colors are right
			blocks[i].Color = colors[b.Level]
		}
	}
	return blocks
}

type waybarLine struct {
	Text       string   `json:"text"`
	Alt        string   `json:"alt"`
	Tooltip    string   `json:"tooltip"`
	Class      []string `json:"class"`
	Percentage int      `json:"percentage"`
}

func waybar(line *Line) waybarLine {
	full, _ := joined(line)
	w := waybarLine{
		Text: pango.Replace(full), Alt: line.Class, Tooltip: pango.Replace(cmp.Or(line.Tooltip, full)),
		Class: []string{line.Worst().String()}, Percentage: line.Percent,
	}
	if line.Class != w.Class[0] {
		w.Class = append(w.Class, line.Class)
	}
	if urgent(line) {
		w.Class = append(w.Class, "urgent")
	}
	return w
}

type i3statusRustLine struct {
	State     string `json:"state"`
	Text      string `json:"text"`
	ShortText string `json:"short_text"`
}

func i3statusRust(line *Line) i3statusRustLine {
	full, short := joined(line)
	return i3statusRustLine{
		State: map[Level]string{Normal: "Idle", Warning: "Warning", Unknown: "Warning", Critical: "Critical"}[line.Worst()],
		Text:  pango.Replace(full), ShortText: pango.Replace(short),
	}
}

func joined(line *Line) (full, short string) {
	var fulls, shorts []string
	for _, b := range line.Blocks {
		fulls, shorts = append(fulls, b.Full), append(shorts, cmp.Or(b.Short, b.Full))
	}
	return strings.Join(fulls, " | "), strings.Join(shorts, " | ")
}

func urgent(line *Line) bool {
	return slices.ContainsFunc(line.Blocks, func(b Block) bool { return b.Urgent })
}
