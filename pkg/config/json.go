package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// object is a JSON object. Unlike in encoding/json a key is matched as it is
// spelled, and one that is there twice does not go unnoticed.
type object struct {
	name  string // as a message names the object itself
	below string // what stands before a key of it in a message
	keys  []string
	twice []string
	raw   map[string]json.RawMessage
}

// maxNamed is how many keys one message names.
const maxNamed = 8

// listed joins what a message names, and says how much it leaves out.
func listed(list []string, all int, sep string) string {
	if left := all - len(list); left > 0 {
		return fmt.Sprintf("%s%sand %d more", strings.Join(list, sep), sep, left)
	}
	return strings.Join(list, sep)
}

// parse reads a document that must be an object; title names it.
func parse(title, below string, doc []byte) (*object, error) {
	var raw json.RawMessage
	if err := json.Unmarshal(doc, &raw); err != nil {
		where := ""
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			before := doc[:min(int(syntax.Offset), len(doc))]
			where = fmt.Sprintf(" line %d:", 1+bytes.Count(before, []byte("\n")))
		}
		return nil, types.NewError(types.ErrDecodingFailure, "configuration is not JSON",
			fmt.Sprintf("%s:%s %v", title, where, err))
	}
	if kind(raw) != '{' {
		return nil, types.NewError(types.ErrDecodingFailure, "configuration is not a JSON object",
			fmt.Sprintf("%s is %s: want {…}", title, describe(raw)))
	}
	return newObject(title, below, raw)
}

// newObject reads raw, which is known to be well-formed JSON.
func newObject(name, below string, raw json.RawMessage) (*object, error) {
	if kind(raw) != '{' {
		return nil, invalid("%s is %s: want an object in braces", name, describe(raw))
	}
	o := &object{name: name, below: below, raw: make(map[string]json.RawMessage)}
	d := json.NewDecoder(bytes.NewReader(raw))
	if _, err := d.Token(); err != nil {
		return nil, invalid("%s: %v", name, err)
	}
	again := make(map[string]bool)
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return nil, invalid("%s: %v", name, err)
		}
		key, _ := token.(string)
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, invalid("%s: %v", o.at(key), err)
		}
		if _, ok := o.raw[key]; !ok {
			o.keys = append(o.keys, key)
		} else if !again[key] {
			again[key] = true
			o.twice = append(o.twice, key)
		}
		o.raw[key] = value // the last one counts, as in encoding/json
	}
	return o, nil
}

// at names the value of key.
func (o *object) at(key string) string { return o.below + clip(key) }

// clip shortens a key that somebody made very long and shows what a terminal would not.
func clip(key string) string {
	q := fmt.Sprintf("%.80q", key)
	return q[1 : len(q)-1]
}

// get returns the value of key, and nil when it is absent or null.
func (o *object) get(key string) json.RawMessage {
	if raw := o.raw[key]; len(raw) > 0 && kind(raw) != 'n' {
		return raw
	}
	return nil
}

func (o *object) twiceErr() error {
	if len(o.twice) == 0 {
		return nil
	}
	names := make([]string, min(len(o.twice), maxNamed))
	for i := range names {
		names[i] = o.at(o.twice[i])
	}
	return invalid("%s is there twice: keep one", listed(names, len(o.twice), ", "))
}

// check refuses keys that are not known and keys that are there twice, all in
// one message. elsewhere says of some unknown ones where they belong.
func (o *object) check(known []string, elsewhere map[string]string) error {
	var found []string
	unknown := 0
	for _, key := range o.keys {
		if slices.Contains(known, key) {
			continue
		}
		if unknown++; unknown > maxNamed {
			continue
		}
		text := o.at(key) + " is not a key that is known here"
		if hint := elsewhere[key]; hint != "" {
			text = o.at(key) + " " + hint
		} else if near := suggest(key, known); near != "" {
			text += fmt.Sprintf(": did you mean %q?", near)
		} else {
			text += ": remove it"
		}
		found = append(found, text)
	}
	if unknown > maxNamed {
		found = append(found, fmt.Sprintf("and %d more keys that are not known", unknown-maxNamed))
	}
	if err := o.twiceErr(); err != nil {
		var e *types.Error
		errors.As(err, &e)
		found = append(found, e.Details)
	}
	if len(found) == 0 {
		return nil
	}
	return invalid("%s", strings.Join(found, "; "))
}

// near says, for a key that is missing, which key of o may have been meant.
func (o *object) near(key string) string {
	for _, have := range o.keys {
		if have != key && suggest(have, []string{key}) != "" {
			return fmt.Sprintf(" (%q is not the same key)", clip(have))
		}
	}
	return ""
}

// object returns the object that key holds, or nil.
func (o *object) object(key string) (*object, error) {
	raw := o.get(key)
	if raw == nil {
		return nil, nil
	}
	return newObject(o.at(key), o.at(key)+".", raw)
}

// text returns the string that key holds, or "".
func (o *object) text(key string) (string, error) {
	raw := o.get(key)
	if raw == nil {
		return "", nil
	}
	return text(o.at(key), raw)
}

func text(at string, raw json.RawMessage) (string, error) {
	var s string
	if kind(raw) != '"' {
		return "", invalid("%s is %s: want a string in quotes", at, describe(raw))
	}
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", invalid("%s: %v", at, err)
	}
	return s, nil
}

// list returns the elements that key holds, or nil.
func (o *object) list(key, example string) ([]json.RawMessage, error) {
	raw := o.get(key)
	if raw == nil {
		return nil, nil
	}
	return list(o.at(key), example, raw)
}

func list(at, example string, raw json.RawMessage) ([]json.RawMessage, error) {
	var elements []json.RawMessage
	if kind(raw) != '[' {
		return nil, invalid("%s is %s: want a list, like %s", at, describe(raw), example)
	}
	if err := json.Unmarshal(raw, &elements); err != nil {
		return nil, invalid("%s: %v", at, err)
	}
	return elements, nil
}

// texts returns the list of strings that key holds, or nil.
func (o *object) texts(key, example string) ([]string, error) {
	elements, err := o.list(key, example)
	if err != nil {
		return nil, err
	}
	var out []string
	for i, raw := range elements {
		s, err := text(fmt.Sprintf("%s[%d]", o.at(key), i), raw)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// number returns the whole number that key holds, or nil.
func (o *object) number(key string) (*int, error) {
	raw := o.get(key)
	if raw == nil {
		return nil, nil
	}
	var n int
	if err := json.Unmarshal(raw, &n); err != nil {
		return nil, invalid("%s is %s: want a whole number", o.at(key), describe(raw))
	}
	return &n, nil
}

func (o *object) boolean(key string) (bool, error) {
	raw := o.get(key)
	if raw == nil {
		return false, nil
	}
	var b bool
	if err := json.Unmarshal(raw, &b); err != nil {
		return false, invalid("%s is %s: want true or false, without quotes", o.at(key), describe(raw))
	}
	return b, nil
}

// duration reads text, the value of at.
func duration(at, text string, least, most time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil || d < least || d > most {
		return 0, invalid("%s is %.40q: want a duration like \"10s\", from %s to %s", at, text, short(least), short(most))
	}
	return d, nil
}

// short spells 10m0s as 10m.
func short(d time.Duration) string {
	s := d.String()
	if d >= time.Minute {
		s = strings.TrimSuffix(s, "0s")
	}
	if d >= time.Hour {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// kind is the first byte of a value: { [ " t f n or that of a number.
func kind(raw json.RawMessage) byte {
	if b := bytes.TrimLeft(raw, " \t\r\n"); len(b) > 0 {
		return b[0]
	}
	return 0
}

// describe says in words what raw is.
func describe(raw json.RawMessage) string {
	switch kind(raw) {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a string" // not which: it may be a secret in the wrong place
	case 't', 'f', 'n':
		return string(bytes.TrimSpace(raw))
	}
	return fmt.Sprintf("the number %.60s", bytes.TrimSpace(raw))
}

// suggest returns the known key that key may have been meant to be, or "".
func suggest(key string, known []string) string {
	if len(key) > 40 {
		return ""
	}
	best, at := "", 3
	for _, k := range known {
		if strings.EqualFold(k, key) {
			return k
		}
		// A short key is not near to another just because both are short.
		if d := distance(key, k); d < at && d < len(key) && d < len(k) {
			best, at = k, d
		}
	}
	return best
}

// distance is Levenshtein's, in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(row[j]+1, row[j+1]+1, cost)
		}
	}
	return row[len(b)]
}
