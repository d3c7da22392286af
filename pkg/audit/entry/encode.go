package entry

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"go4.org/netipx"
	"golang.org/x/mod/sumdb/note"
)

// field is one line (or several lines of one key) of an op's own part.
type field uint8

const (
	fWriter field = iota
	fKey
	fMachine
	fCluster
	fEtcdCluster
	fEpoch
	fState
	fRecovering
	fVersion
	fPredecessor
	fMark
	fCloses
	fRemove
	fSpace
	fPool
	fSpec
	fBlock
	fAddress
	fAcquire
	fCooldown
	fAssert
	fNetwork
	fContainer
	fInterface
	fNode
	fPod
	fPodUID
	fTrace
	fReason
	fieldCount
)

// keys are the lines' keys. The order of the constants is the order of lines.
var keys = [fieldCount]string{
	"writer", "key", "machine", "cluster", "etcd-cluster", "epoch", "state", "recovering", "version",
	"predecessor", "mark", "closes", "remove",
	"space", "pool", "spec", "block", "address", "acquire", "cooldown", "assert",
	"network", "container", "interface", "node", "pod", "pod-uid", "trace", "reason",
}

// shape says which fields an op must have and which it may have.
type shape struct{ must, may uint32 }

func bits(ff ...field) (b uint32) {
	for _, f := range ff {
		b |= 1 << f
	}
	return b
}

var holder = bits(fSpace, fPool, fAddress, fNetwork, fContainer, fInterface, fNode)

var shapes = map[Op]*shape{
	Open:    {bits(fWriter, fKey, fCluster, fEpoch), bits(fMachine, fPredecessor, fMark, fReason)},
	Rotate:  {bits(fKey), bits(fReason)},
	Close:   {bits(fWriter, fCloses), bits(fRemove, fReason)},
	Acquire: {holder, bits(fBlock, fCooldown, fAssert, fPod, fPodUID, fTrace, fReason)},
	Release: {holder | bits(fAcquire), bits(fPod, fPodUID, fTrace, fReason)},
	Claim:   {bits(fSpace, fPool, fBlock, fNode), bits(fReason)},
	Unclaim: {bits(fSpace, fPool, fBlock, fNode), bits(fReason)},
	Pool:    {bits(fPool, fSpec), bits(fReason)},
	Meta:    {bits(fCluster, fEtcdCluster, fEpoch, fState, fVersion), bits(fRecovering, fReason)},
	Recover: {bits(fEpoch), bits(fReason)},
}

const timeLayout = "2006-01-02T15:04:05.000000000Z"

// appendText appends the signed text: everything before the blank line.
func (e *Entry) appendText(dst []byte) []byte {
	if e.unknown {
		return append(dst, e.raw...)
	}
	dst = append(dst, Header+"\nchain "...)
	dst = hex.AppendEncode(dst, e.Chain[:])
	dst = append(dst, "\nseq "...)
	dst = strconv.AppendUint(dst, e.Seq, 10)
	dst = append(dst, "\nprev "...)
	dst = hex.AppendEncode(dst, e.Prev[:])
	dst = append(dst, "\ntime "...)
	dst = appendTime(dst, e.Time)
	dst = append(dst, "\nrevision "...)
	dst = strconv.AppendInt(dst, e.Revision, 10)
	dst = append(dst, "\nop "...)
	dst = append(dst, e.Op...)
	dst = append(dst, '\n')

	line := func(f field) {
		dst = append(dst, keys[f]...)
		dst = append(dst, ' ')
	}
	token := func(f field, s string) {
		if s != "" {
			line(f)
			dst = append(dst, s...)
			dst = append(dst, '\n')
		}
	}
	text := func(f field, s string) {
		if s != "" {
			line(f)
			dst = appendQuoted(dst, s)
			dst = append(dst, '\n')
		}
	}
	ref := func(f field, r *Ref) {
		if !r.IsZero() {
			line(f)
			dst = r.append(dst)
			dst = append(dst, '\n')
		}
	}
	if e.Writer != (Writer{}) {
		line(fWriter)
		dst = append(dst, e.Writer.Kind...)
		dst = append(dst, '/')
		dst = append(dst, e.Writer.Name...)
		dst = append(dst, '\n')
	}
	number := func(f field, n uint64) {
		if n != 0 {
			line(f)
			dst = strconv.AppendUint(dst, n, 10)
			dst = append(dst, '\n')
		}
	}
	flag := func(f field, on bool) {
		if on {
			token(f, yes)
		}
	}
	token(fKey, e.Key)
	token(fMachine, e.Machine)
	token(fCluster, e.Cluster)
	token(fEtcdCluster, e.EtcdCluster)
	number(fEpoch, e.Epoch)
	token(fState, e.State)
	flag(fRecovering, e.Recovering)
	number(fVersion, e.Version)
	ref(fPredecessor, &e.Predecessor)
	ref(fMark, &e.Mark)
	ref(fCloses, &e.Closes)
	flag(fRemove, e.Remove)
	token(fSpace, e.Space)
	token(fPool, e.Pool)
	if e.Op == Pool {
		line(fSpec)
		dst = hex.AppendEncode(dst, e.Spec[:])
		dst = append(dst, '\n')
	}
	for i := range e.Blocks {
		line(fBlock)
		dst = e.Blocks[i].AppendTo(dst)
		dst = append(dst, '\n')
	}
	for i := range e.Addresses {
		line(fAddress)
		dst = e.Addresses[i].append(dst, e.Op == Acquire)
		dst = append(dst, '\n')
	}
	ref(fAcquire, &e.Acquire)
	number(fCooldown, uint64(e.Cooldown))
	token(fAssert, e.Assert)
	token(fNetwork, e.Network)
	token(fContainer, e.Container)
	text(fInterface, e.Interface)
	token(fNode, e.Node)
	text(fPod, e.Pod)
	text(fPodUID, e.PodUID)
	text(fTrace, e.Trace)
	text(fReason, e.Reason)
	return dst
}

// yes is the value of a flag's line, which is there only where the flag is set.
const yes = "yes"

// append appends an address: of an acquire "IP/BITS [gateway IP] [range IP-IP]
// after REFERENCE", with "-" where it was never held, else "IP".
func (a *Address) append(dst []byte, acquired bool) []byte {
	dst = a.IP.AppendTo(dst)
	if !acquired {
		return dst
	}
	dst = append(dst, '/')
	dst = strconv.AppendInt(dst, int64(a.Bits), 10)
	if a.Gateway.IsValid() {
		dst = append(dst, " gateway "...)
		dst = a.Gateway.AppendTo(dst)
	}
	if !a.Range.IsZero() {
		dst = append(dst, " range "...)
		dst = a.Range.From().AppendTo(dst)
		dst = append(dst, '-')
		dst = a.Range.To().AppendTo(dst)
	}
	dst = append(dst, " after "...)
	if a.After.IsZero() {
		return append(dst, '-')
	}
	return a.After.append(dst)
}

// appendQuoted is strconv.AppendQuoteToASCII with a short cut for text that
// needs no escape.
func appendQuoted(dst []byte, s string) []byte {
	if !plainText(s) {
		return strconv.AppendQuoteToASCII(dst, s)
	}
	dst = append(dst, '"')
	dst = append(dst, s...)
	return append(dst, '"')
}

func appendTime(dst []byte, t time.Time) []byte {
	t = t.UTC()
	y, mo, d := t.Date()
	h, mi, s := t.Clock()
	digits := func(v, n int) {
		var b [9]byte
		for i := n - 1; i >= 0; i-- {
			b[i] = byte('0' + v%10)
			v /= 10
		}
		dst = append(dst, b[:n]...)
	}
	digits(y, 4)
	dst = append(dst, '-')
	digits(int(mo), 2)
	dst = append(dst, '-')
	digits(d, 2)
	dst = append(dst, 'T')
	digits(h, 2)
	dst = append(dst, ':')
	digits(mi, 2)
	dst = append(dst, ':')
	digits(s, 2)
	dst = append(dst, '.')
	digits(t.Nanosecond(), 9)
	return append(dst, 'Z')
}

var sigPrefix = "— "

// appendSignature appends the blank line and the signature line.
func (s *Signature) append(dst []byte) []byte {
	var raw [68]byte
	binary.BigEndian.PutUint32(raw[:4], s.KeyID)
	copy(raw[4:], s.Bytes[:])
	dst = append(dst, '\n')
	dst = append(dst, sigPrefix...)
	dst = append(dst, s.Name...)
	dst = append(dst, ' ')
	dst = base64.StdEncoding.AppendEncode(dst, raw[:])
	return append(dst, '\n')
}

// Sign validates e, signs it with signer, whose name must be the writer's
// (kind/name), and returns the bytes to store and their hash.
func Sign(e *Entry, signer note.Signer) ([]byte, Hash, error) {
	if err := e.validate(); err != nil {
		return nil, Hash{}, fmt.Errorf("entry %s/%d: %w", e.Chain.Short(), e.Seq, err)
	}
	if _, err := ParseWriter(signer.Name()); err != nil {
		return nil, Hash{}, fmt.Errorf("signer: %w", err)
	}
	stored, err := note.Sign(&note.Note{Text: string(e.appendText(nil))}, signer)
	if err != nil {
		return nil, Hash{}, fmt.Errorf("entry %s/%d: %w", e.Chain.Short(), e.Seq, err)
	}
	// What Parse would refuse must never be stored.
	back, err := Parse(stored)
	if err != nil {
		return nil, Hash{}, fmt.Errorf("entry %s/%d does not parse back: %w", e.Chain.Short(), e.Seq, err)
	}
	e.Signature = back.Signature
	return stored, HashOf(stored), nil
}

// Verify checks the entry's signature with v. It returns nil or an error that
// says whose signature failed.
func Verify(stored []byte, v note.Verifier) error {
	if _, err := note.Open(stored, note.VerifierList(v)); err != nil {
		var unverified *note.UnverifiedNoteError
		if errors.As(err, &unverified) {
			return fmt.Errorf("not signed by %s+%08x", v.Name(), v.KeyHash())
		}
		return fmt.Errorf("signature of %s+%08x: %w", v.Name(), v.KeyHash(), err)
	}
	return nil
}

func (e *Entry) validate() error {
	sh, ok := shapes[e.Op]
	if !ok {
		return fmt.Errorf("op %.80q is not one of version 1", e.Op)
	}
	if e.Seq == 0 {
		return errors.New("seq 0: the first entry of a chain is 1")
	}
	if (e.Op == Open) != (e.Seq == 1) {
		return fmt.Errorf("op %s at seq %d: a chain starts with open, at seq 1, and nowhere else", e.Op, e.Seq)
	}
	if (e.Prev == Hash{}) != (e.Seq == 1) {
		return fmt.Errorf("prev at seq %d: it is zero for the first entry and for no other", e.Seq)
	}
	if e.Revision < 0 {
		return fmt.Errorf("revision %d is negative", e.Revision)
	}
	if y := e.Time.UTC().Year(); y < 1970 || y > 9999 {
		return fmt.Errorf("time %v: want a year from 1970 to 9999", e.Time)
	}
	has := e.fields()
	if missing := sh.must &^ has; missing != 0 {
		return fmt.Errorf("op %s lacks %s", e.Op, fieldNames(missing))
	}
	if extra := has &^ (sh.must | sh.may); extra != 0 {
		return fmt.Errorf("op %s has no %s", e.Op, fieldNames(extra))
	}
	return e.validateFields(has)
}

func fieldNames(b uint32) string {
	var names []string
	for f := range fieldCount {
		if b&(1<<f) != 0 {
			names = append(names, keys[f])
		}
	}
	return strings.Join(names, ", ")
}

// fields says which fields are set.
func (e *Entry) fields() (b uint32) {
	set := func(f field, on bool) {
		if on {
			b |= 1 << f
		}
	}
	set(fWriter, e.Writer != Writer{})
	set(fKey, e.Key != "")
	set(fMachine, e.Machine != "")
	set(fCluster, e.Cluster != "")
	set(fEtcdCluster, e.EtcdCluster != "")
	set(fEpoch, e.Epoch != 0)
	set(fState, e.State != "")
	set(fRecovering, e.Recovering)
	set(fVersion, e.Version != 0)
	set(fPredecessor, !e.Predecessor.IsZero())
	set(fMark, !e.Mark.IsZero())
	set(fCloses, !e.Closes.IsZero())
	set(fRemove, e.Remove)
	set(fSpace, e.Space != "")
	set(fPool, e.Pool != "")
	set(fSpec, e.Op == Pool || e.Spec != Hash{})
	set(fBlock, len(e.Blocks) > 0)
	set(fAddress, len(e.Addresses) > 0)
	set(fAcquire, !e.Acquire.IsZero())
	set(fCooldown, e.Cooldown != 0)
	set(fAssert, e.Assert != "")
	set(fNetwork, e.Network != "")
	set(fContainer, e.Container != "")
	set(fInterface, e.Interface != "")
	set(fNode, e.Node != "")
	set(fPod, e.Pod != "")
	set(fPodUID, e.PodUID != "")
	set(fTrace, e.Trace != "")
	set(fReason, e.Reason != "")
	return b
}

func (e *Entry) validateFields(has uint32) error {
	if has&(1<<fWriter) != 0 {
		if err := e.Writer.Validate(); err != nil {
			return err
		}
	}
	for _, c := range []struct {
		f     field
		value string
		limit int
	}{
		{fMachine, e.Machine, MaxName},
		{fCluster, e.Cluster, MaxName},
		{fEtcdCluster, e.EtcdCluster, MaxName},
		{fState, e.State, MaxName},
		{fSpace, e.Space, MaxName},
		{fPool, e.Pool, MaxName},
		{fNetwork, e.Network, MaxNetwork},
		{fContainer, e.Container, MaxContainer},
		{fNode, e.Node, MaxName},
	} {
		if has&(1<<c.f) != 0 {
			if err := validateToken(keys[c.f], c.value, c.limit); err != nil {
				return err
			}
		}
	}
	for _, c := range []struct {
		f     field
		value string
		limit int
	}{
		{fInterface, e.Interface, MaxInterface},
		{fPod, e.Pod, MaxPod},
		{fPodUID, e.PodUID, MaxText},
		{fTrace, e.Trace, MaxText},
		{fReason, e.Reason, MaxText},
	} {
		if len(c.value) > c.limit {
			return fmt.Errorf("%s has %d bytes: at most %d", keys[c.f], len(c.value), c.limit)
		}
	}
	if has&(1<<fKey) != 0 {
		if len(e.Key) > 4*MaxName {
			return fmt.Errorf("key has %d bytes: at most %d", len(e.Key), 4*MaxName)
		}
		v, err := note.NewVerifier(e.Key)
		if err != nil {
			return fmt.Errorf("key %.200q: %w", e.Key, err)
		}
		// One spelling: NewVerifier accepts several of the ID and of base64.
		// The base64 may hold a "+" of its own, so the parts are cut from the left.
		parts := strings.SplitN(e.Key, "+", 3)
		pub, _ := base64.StdEncoding.DecodeString(parts[2])
		if e.Key != fmt.Sprintf("%s+%08x+%s", v.Name(), v.KeyHash(), base64.StdEncoding.EncodeToString(pub)) {
			return fmt.Errorf("key %.200q is not in its one spelling", e.Key)
		}
		if e.Op == Open && v.Name() != e.Writer.String() {
			return fmt.Errorf("key %q is not named %s", e.Key, e.Writer)
		}
	}
	if e.State != "" && e.State != "running" && e.State != "frozen" {
		return fmt.Errorf("state %.80q: want running or frozen", e.State)
	}
	if e.Assert != "" && e.Assert != AssertRecover && e.Assert != AssertImport {
		return fmt.Errorf("assert %.80q: want %s or %s", e.Assert, AssertRecover, AssertImport)
	}
	if e.Cooldown < 0 || e.Cooldown > MaxCooldown {
		return fmt.Errorf("cooldown %d: want 0 to %d seconds", e.Cooldown, MaxCooldown)
	}
	if len(e.Blocks) > MaxBlocks {
		return fmt.Errorf("%d blocks: at most %d", len(e.Blocks), MaxBlocks)
	}
	for _, p := range e.Blocks {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
			return fmt.Errorf("block %v is not an aligned prefix", p)
		}
	}
	if len(e.Addresses) > MaxAddresses {
		return fmt.Errorf("%d addresses: at most %d", len(e.Addresses), MaxAddresses)
	}
	for i, a := range e.Addresses {
		if !plainIP(a.IP) {
			return fmt.Errorf("address %v is not a plain IPv4 or IPv6 address", a.IP)
		}
		for _, b := range e.Addresses[:i] {
			if a.IP == b.IP {
				return fmt.Errorf("address %v stands twice", a.IP)
			}
		}
		if e.Op != Acquire {
			if a != (Address{IP: a.IP}) {
				return fmt.Errorf("address %v: only an acquire says more than the address", a.IP)
			}
			continue
		}
		switch g, r := a.Gateway, a.Range; {
		case a.Bits < 1 || a.Bits > a.IP.BitLen():
			return fmt.Errorf("address %v: a subnet of %d bits: want 1 to %d", a.IP, a.Bits, a.IP.BitLen())
		case g.IsValid() && (!plainIP(g) || g.Is4() != a.IP.Is4()):
			return fmt.Errorf("address %v: gateway %v is not of its family", a.IP, g)
		case !r.IsZero() && (!r.IsValid() || !plainIP(r.From()) || !plainIP(r.To()) || !r.Contains(a.IP)):
			return fmt.Errorf("address %v is not in its range %v", a.IP, r)
		}
	}
	return nil
}

func plainIP(ip netip.Addr) bool { return ip.IsValid() && !ip.Is4In6() && ip.Zone() == "" }

// Parse reads one entry as it is stored. It returns ErrVersion, with an Entry
// that holds the signature alone, for a version it does not know.
func Parse(stored []byte) (*Entry, error) {
	e := new(Entry)
	s := string(stored)
	err := parse(s, e)
	if err != nil && !errors.Is(err, ErrVersion) {
		return nil, err
	}
	if err := e.respell(s); err != nil {
		return nil, err
	}
	return e, err
}

// respell writes the entry again and compares. parse has refused every other
// spelling already, field by field; this is the proof of it, and what a fuzz
// test holds ParseInto against.
func (e *Entry) respell(s string) error {
	buf := scratch.Get().(*[]byte)
	defer scratch.Put(buf)
	out := e.appendText((*buf)[:0])
	out = e.Signature.append(out)
	*buf = out
	if string(out) != s {
		i := 0
		for i < len(out) && i < len(s) && out[i] == s[i] {
			i++
		}
		return fmt.Errorf("byte %d is not as this entry is spelled", i)
	}
	return nil
}

// ParseInto is Parse into an Entry of the caller's, whose slices it reuses; the
// entry's strings share stored's memory. It refuses what Parse refuses, and does
// not prove it by writing the entry again. For readers of millions.
func ParseInto(stored string, e *Entry) error { return parse(stored, e) }

var scratch = sync.Pool{New: func() any { b := make([]byte, 0, 2048); return &b }}

func parse(s string, e *Entry) error {
	*e = Entry{Blocks: e.Blocks[:0], Addresses: e.Addresses[:0]}
	if len(s) > MaxSize {
		return fmt.Errorf("entry of %d bytes: at most %d", len(s), MaxSize)
	}
	text, rest, ok := cutText(s)
	if !ok {
		return errors.New("not a signed note: no blank line and signature after the text")
	}
	if err := e.Signature.parse(rest); err != nil {
		return err
	}
	newer := false
	if !strings.HasPrefix(text, Header+"\n") {
		if !strings.HasPrefix(text, headerStem) {
			first, _, _ := strings.Cut(text, "\n")
			return fmt.Errorf("first line is %.80q, want %q", first, Header)
		}
		if strings.Contains(text, "\n\n") {
			return errors.New("a blank line stands in the text")
		}
		newer, e.unknown, e.raw = true, true, text
	} else if err := e.parseText(text); err != nil {
		return err
	}

	if newer {
		return ErrVersion
	}
	return nil
}

// cutText splits at the blank line. The text has no blank line of its own, as
// every line of it is "key value".
func cutText(s string) (text, rest string, ok bool) {
	// What follows the key's name has a fixed length, so that the blank line is
	// near. parseText refuses blank lines before it.
	if at := len(s) - len(" \n") - signatureLen; at > 0 {
		if i := strings.LastIndexByte(s[:at], '\n'); i > 0 && s[i-1] == '\n' {
			return s[:i], s[i+1:], true
		}
	}
	i := strings.Index(s, "\n\n")
	if i < 0 {
		return "", "", false
	}
	return s[:i+1], s[i+2:], true
}

// signatureLen is the length of the base64 of key ID and signature.
const signatureLen = 92

// strictBase64 refuses bits that no byte needs. Line breaks, which it skips, make
// the value too short.
var strictBase64 = base64.StdEncoding.Strict()

func (s *Signature) parse(line string) error {
	name, ok := strings.CutPrefix(line, sigPrefix)
	if !ok {
		return fmt.Errorf("signature line %.80q does not start with %q", line, sigPrefix)
	}
	name, b64, ok := strings.Cut(name, " ")
	if !ok || len(b64) != signatureLen+1 || b64[signatureLen] != '\n' {
		return errors.New("signature line is not \"— name base64\" with 68 bytes, or more follows it")
	}
	var raw [69]byte
	n, err := strictBase64.Decode(raw[:], []byte(b64[:signatureLen]))
	if err != nil || n != 68 {
		return fmt.Errorf("signature is not the base64 of 68 bytes")
	}
	// The name is any that a note's key can have: control characters, spaces
	// and "+" are refused by the note format itself.
	for i := range len(name) {
		if c := name[i]; !tokenByte[c] && c != '/' {
			return fmt.Errorf("signature's key name %.80q is not kind/name", name)
		}
	}
	if name == "" || len(name) > 2*MaxName {
		return fmt.Errorf("signature's key name %.80q is not kind/name", name)
	}
	s.Name = name
	s.KeyID = binary.BigEndian.Uint32(raw[:4])
	copy(s.Bytes[:], raw[4:68])
	return nil
}

// reader walks the lines of a text.
type reader struct{ rest string }

// next returns the next line's key and value.
func (r *reader) next() (key, value string, err error) {
	i := strings.IndexByte(r.rest, '\n')
	if i < 0 {
		return "", "", errors.New("text ends early")
	}
	key, value, ok := strings.Cut(r.rest[:i], " ")
	if !ok || key == "" || value == "" {
		return "", "", fmt.Errorf("line %.80q is not \"key value\"", r.rest[:i])
	}
	r.rest = r.rest[i+1:]
	return key, value, nil
}

// value returns the value of the next line if key is its key.
func (r *reader) value(key string) (value string, ok bool) {
	n := len(key) + 1
	if len(r.rest) <= n || r.rest[n-1] != ' ' || r.rest[:n-1] != key {
		return "", false
	}
	i := strings.IndexByte(r.rest[n:], '\n')
	if i <= 0 {
		return "", false
	}
	value, r.rest = r.rest[n:n+i], r.rest[n+i+1:]
	return value, true
}

func (r *reader) want(key string) (string, error) {
	if v, ok := r.value(key); ok {
		return v, nil
	}
	k, _, err := r.next()
	if err != nil {
		return "", fmt.Errorf("%s: %w", key, err)
	}
	return "", fmt.Errorf("line %.40q where %s is due", k, key)
}

func (e *Entry) parseText(text string) error {
	r := reader{text[len(Header)+1:]}
	v, err := r.want("chain")
	if err != nil {
		return err
	}
	if err := unhex(e.Chain[:], v, "chain"); err != nil {
		return err
	}
	if v, err = r.want("seq"); err != nil {
		return err
	}
	if e.Seq, err = parseUint(v, "seq"); err != nil {
		return err
	}
	if v, err = r.want("prev"); err != nil {
		return err
	}
	if err := unhex(e.Prev[:], v, "prev"); err != nil {
		return err
	}
	if v, err = r.want("time"); err != nil {
		return err
	}
	if e.Time, err = parseTime(v); err != nil {
		return err
	}
	if v, err = r.want("revision"); err != nil {
		return err
	}
	rev, err := parseUint(v, "revision")
	if err != nil || rev > 1<<63-1 {
		return fmt.Errorf("revision %.40q is not a revision", v)
	}
	e.Revision = int64(rev)
	if v, err = r.want("op"); err != nil {
		return err
	}
	e.Op = Op(v)
	if _, ok := shapes[e.Op]; !ok {
		if err := validateToken("op", v, MaxName); err != nil {
			return err
		}
		for r.rest != "" { // still lines of key and value
			if _, _, err := r.next(); err != nil {
				return err
			}
		}
		e.unknown, e.raw = true, text
		return nil
	}
	at, seen := field(0), uint32(0)
	for r.rest != "" {
		v, ok := "", false
		for ; at < fieldCount; at++ {
			if v, ok = r.value(keys[at]); ok {
				break
			}
		}
		if !ok {
			k, _, err := r.next()
			if err != nil {
				return err
			}
			return fmt.Errorf("line %.40q is unknown or out of order", k)
		}
		if err := e.parseField(at, v); err != nil {
			return err
		}
		seen |= 1 << at
		if at != fBlock && at != fAddress {
			at++
		}
	}
	// A line that says nothing is one that is not written.
	if empty := seen &^ e.fields(); empty != 0 {
		return fmt.Errorf("%s is zero: leave the line out", fieldNames(empty))
	}
	// A spec may hash to anything, so that its line is there or missing.
	if missing := e.fields() &^ seen; missing != 0 {
		return fmt.Errorf("op %s lacks %s", e.Op, fieldNames(missing))
	}
	return e.validate()
}

func (e *Entry) parseField(f field, v string) (err error) {
	switch f {
	case fWriter:
		e.Writer, err = ParseWriter(v)
	case fKey:
		e.Key = v
	case fMachine:
		e.Machine = v
	case fCluster:
		e.Cluster = v
	case fEtcdCluster:
		e.EtcdCluster = v
	case fEpoch:
		if e.Epoch, err = parseUint(v, keys[f]); err == nil && e.Epoch == 0 {
			err = errors.New("epoch 0: the first is 1")
		}
	case fState:
		e.State = v
	case fRecovering:
		e.Recovering, err = parseFlag(f, v)
	case fVersion:
		e.Version, err = parseUint(v, keys[f])
	case fPredecessor:
		e.Predecessor, err = ParseRef(v)
	case fMark:
		e.Mark, err = ParseRef(v)
	case fCloses:
		e.Closes, err = ParseRef(v)
	case fRemove:
		e.Remove, err = parseFlag(f, v)
	case fSpace:
		e.Space = v
	case fPool:
		e.Pool = v
	case fSpec:
		err = unhex(e.Spec[:], v, keys[f])
	case fBlock:
		var p netip.Prefix
		if p, err = netip.ParsePrefix(v); err == nil {
			var b [64]byte
			if string(p.AppendTo(b[:0])) != v {
				return fmt.Errorf("block %q: it is spelled %v", v, p)
			}
			e.Blocks = append(e.Blocks, p)
		}
	case fAddress:
		err = e.parseAddress(v)
	case fAcquire:
		e.Acquire, err = ParseRef(v)
	case fCooldown:
		var n uint64
		if n, err = parseUint(v, keys[f]); err == nil && n > MaxCooldown {
			err = fmt.Errorf("cooldown %d: want 0 to %d seconds", n, MaxCooldown)
		}
		e.Cooldown = int64(n)
	case fAssert:
		e.Assert = v
	case fNetwork:
		e.Network = v
	case fContainer:
		e.Container = v
	case fInterface:
		e.Interface, err = unquote(keys[f], v)
	case fNode:
		e.Node = v
	case fPod:
		e.Pod, err = unquote(keys[f], v)
	case fPodUID:
		e.PodUID, err = unquote(keys[f], v)
	case fTrace:
		e.Trace, err = unquote(keys[f], v)
	case fReason:
		e.Reason, err = unquote(keys[f], v)
	}
	return err
}

func parseFlag(f field, v string) (bool, error) {
	if v != yes {
		return false, fmt.Errorf("%s %.40q: want %s, or no line", keys[f], v, yes)
	}
	return true, nil
}

func (e *Entry) parseAddress(v string) (err error) {
	var a Address
	ip, rest, more := strings.Cut(v, " ")
	if more != (e.Op == Acquire) {
		return fmt.Errorf("address %.200q: \"after\" belongs to an acquire and to nothing else", v)
	}
	if !more {
		if a.IP, err = parseIP(ip); err == nil {
			e.Addresses = append(e.Addresses, a)
		}
		return err
	}
	ip, bits, _ := strings.Cut(ip, "/")
	if a.IP, err = parseIP(ip); err != nil {
		return err
	}
	n, err := parseUint(bits, "length of a subnet")
	if err != nil || n > 128 {
		return fmt.Errorf("address %.200q: want IP/BITS", v)
	}
	a.Bits = int(n)
	if g, ok := strings.CutPrefix(rest, "gateway "); ok {
		g, rest, _ = strings.Cut(g, " ")
		if a.Gateway, err = parseIP(g); err != nil {
			return err
		}
	}
	if r, ok := strings.CutPrefix(rest, "range "); ok {
		r, rest, _ = strings.Cut(r, " ")
		from, to, _ := strings.Cut(r, "-")
		first, err := parseIP(from)
		if err != nil {
			return err
		}
		last, err := parseIP(to)
		if err != nil {
			return err
		}
		if a.Range = netipx.IPRangeFrom(first, last); !a.Range.IsValid() {
			return fmt.Errorf("address %.200q: its range is empty", v)
		}
	}
	ref, ok := strings.CutPrefix(rest, "after ")
	if !ok {
		return fmt.Errorf("address %.200q: want \"IP/BITS [gateway IP] [range IP-IP] after REFERENCE\"", v)
	}
	if ref != "-" {
		if a.After, err = ParseRef(ref); err != nil {
			return err
		}
		if a.After.IsZero() {
			return fmt.Errorf("address %.200q: no release is spelled -", v)
		}
	}
	e.Addresses = append(e.Addresses, a)
	return nil
}

// parseIP reads an address in its one spelling.
func parseIP(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil {
		return ip, fmt.Errorf("address %.200q: %w", s, err)
	}
	var b [64]byte
	if !ip.Is4() && string(ip.AppendTo(b[:0])) != s { // an IPv4 address has one spelling
		return ip, fmt.Errorf("address %q: it is spelled %v", s, ip)
	}
	return ip, nil
}

func unquote(key, v string) (string, error) {
	if len(v) >= 2 && v[0] == '"' && v[len(v)-1] == '"' && plainText(v[1:len(v)-1]) {
		v = v[1 : len(v)-1]
	} else {
		s, err := strconv.Unquote(v)
		if err != nil || strconv.QuoteToASCII(s) != v {
			return "", fmt.Errorf("%s %.80q is not quoted text", key, v)
		}
		v = s
	}
	if v == "" {
		return "", fmt.Errorf("%s is empty: leave the line out", key)
	}
	return v, nil
}

// plainText is whether quoting changes nothing.
func plainText(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c >= 0x7f || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

func parseUint(s, what string) (uint64, error) {
	if s == "" || len(s) > 20 || (s[0] == '0' && len(s) > 1) {
		return 0, fmt.Errorf("%s %.40q is not a plain decimal number", what, s)
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || s[0] == '+' {
		return 0, fmt.Errorf("%s %.40q is not a plain decimal number", what, s)
	}
	return n, nil
}

func parseTime(s string) (time.Time, error) {
	if len(s) != len(timeLayout) || s[4] != '-' || s[7] != '-' || s[10] != 'T' || s[13] != ':' || s[16] != ':' || s[19] != '.' || s[29] != 'Z' {
		return time.Time{}, fmt.Errorf("time %.40q: want %s", s, timeLayout)
	}
	bad := false
	num := func(from, to int) (n int) {
		for i := from; i < to; i++ {
			c := s[i] - '0'
			bad = bad || c > 9
			n = 10*n + int(c)
		}
		return n
	}
	y, mo, d, h, mi, sec, ns := num(0, 4), num(5, 7), num(8, 10), num(11, 13), num(14, 16), num(17, 19), num(20, 29)
	if bad || mo < 1 || mo > 12 || d < 1 || d > 28 && d > daysIn(y, mo) || h > 23 || mi > 59 || sec > 59 {
		return time.Time{}, fmt.Errorf("time %.40q: want %s", s, timeLayout)
	}
	return time.Date(y, time.Month(mo), d, h, mi, sec, ns, time.UTC), nil
}

func daysIn(y, mo int) int { return time.Date(y, time.Month(mo)+1, 0, 0, 0, 0, 0, time.UTC).Day() }
