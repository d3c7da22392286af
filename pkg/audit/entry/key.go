package entry

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/note"
)

// NewKey makes an Ed25519 key for a writer and returns it as a C2SP signer key,
// to be kept secret.
func NewKey(w Writer) (skey string, err error) {
	if err := w.Validate(); err != nil {
		return "", err
	}
	skey, _, err = note.GenerateKey(rand.Reader, w.String())
	return skey, err
}

// ReadSigner reads a signer key and derives the verifier key that belongs to it.
func ReadSigner(skey string) (signer note.Signer, vkey string, err error) {
	if signer, err = note.NewSigner(skey); err != nil {
		return nil, "", err
	}
	// note.NewSigner has checked the form: algorithm byte, then the seed.
	// The base64 may hold a "+" of its own, so the parts are cut from the left.
	parts := strings.SplitN(skey, "+", 5)
	seed, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(seed) != 1+ed25519.SeedSize {
		return nil, "", fmt.Errorf("signer key of %s is not an Ed25519 seed", signer.Name())
	}
	pub := ed25519.NewKeyFromSeed(seed[1:]).Public().(ed25519.PublicKey)
	vkey, err = note.NewEd25519VerifierKey(signer.Name(), pub)
	return signer, vkey, err
}
