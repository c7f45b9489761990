package main

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"
)

// tokenHeader is {"typ":"JWT","alg":"RS256"} and a dot, the only header there
// is. A token with any other is refused before a byte of it is decoded: there
// is no alg to confuse, and no kid, jwk or jku to obey (RFC 8725 §3.1).
const tokenHeader = "eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9."

// maxToken bounds the work on a token, in bytes. The longest name and e-mail
// make one of 4.4 KiB.
const maxToken = 8 << 10

// tokens makes and checks access tokens: JSON Web Tokens (RFC 7519), signed
// with RS256, which is RSASSA-PKCS1-v1_5 with SHA-256 (RFC 7518 §3.3).
type tokens struct {
	key *rsa.PrivateKey
	ttl time.Duration

	mu sync.RWMutex
	// verified remembers good tokens that are not revoked: verifying a signature
	// costs more than all the rest of a request.
	verified map[string]claims
	// revoked are those logged out. Claims identify a token: those of one user that
	// expire in the same second are the same to the byte.
	revoked map[claims]bool
}

// claims are what a token says, in the order of the API document.
type claims struct {
	Expires int64  `json:"exp"` // seconds since 1970
	UserID  serial `json:"id"`
	Email   string `json:"email"`
	Name    string `json:"name"`
}

var errToken = errors.New("not a token of ours, or no longer")

func newTokens(key *rsa.PrivateKey, ttl time.Duration) *tokens {
	return &tokens{key: key, ttl: ttl, verified: make(map[string]claims), revoked: make(map[claims]bool)}
}

// sign makes a token that says c and expires after the time to live. It is
// good even if the same, to the byte, was made and revoked within this second.
func (t *tokens) sign(c claims) (string, error) {
	c.Expires = time.Now().Add(t.ttl).Unix()
	unsigned := c.unsigned()
	digest := sha256.Sum256([]byte(unsigned))
	signature, err := rsa.SignPKCS1v15(nil, t.key, crypto.SHA256, digest[:])
	if err != nil {
		return "", err
	}
	t.mu.Lock()
	delete(t.revoked, c)
	t.mu.Unlock()
	return unsigned + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}

// unsigned is a token up to its signature.
func (c claims) unsigned() string {
	payload, _ := json.Marshal(c) // never fails: it is text and a number
	return tokenHeader + base64.RawURLEncoding.EncodeToString(payload)
}

// verify returns what token says, or errToken, whatever is wrong with it.
func (t *tokens) verify(token string) (claims, error) {
	t.mu.RLock()
	c, known := t.verified[token]
	t.mu.RUnlock()
	if !known {
		var err error
		if c, err = t.parse(token); err != nil {
			return claims{}, errToken
		}
	}
	if time.Now().Unix() >= c.Expires { // refused at that very second (RFC 7519 §4.1.4)
		return claims{}, errToken
	}
	if !known && !t.admit(token, c) {
		return claims{}, errToken
	}
	return c, nil
}

// parse checks everything about a token that does not change with time, in an
// order in which nothing is believed before the signature is verified.
func (t *tokens) parse(token string) (claims, error) {
	encoded, ours := strings.CutPrefix(token, tokenHeader)
	if !ours || len(token) > maxToken {
		return claims{}, errToken
	}
	encodedPayload, encodedSignature, _ := strings.Cut(encoded, ".")
	signature, err := base64.RawURLEncoding.DecodeString(encodedSignature)
	if err != nil {
		return claims{}, err
	}
	digest := sha256.Sum256([]byte(tokenHeader + encodedPayload))
	if err := rsa.VerifyPKCS1v15(&t.key.PublicKey, crypto.SHA256, digest[:], signature); err != nil {
		return claims{}, err
	}
	var c claims
	payload, err := base64.RawURLEncoding.DecodeString(encodedPayload)
	if err := errors.Join(err, json.Unmarshal(payload, &c)); err != nil {
		return claims{}, err
	}
	// What sign would write, to the byte: so no claim is missing, given twice or
	// of another type, and there are no line ends or last bits that base64 skips.
	if token != c.unsigned()+"."+base64.RawURLEncoding.EncodeToString(signature) {
		return claims{}, errToken
	}
	return c, nil
}

// admit remembers a verified token, unless it is revoked.
func (t *tokens) admit(token string, c claims) bool {
	const limit = 10_000
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.revoked[c] {
		return false
	}
	if len(t.verified) >= limit {
		clear(t.verified)
	}
	t.verified[token] = c
	return true
}

// revoke ends a token before its time. That is remembered until then, but not
// over a restart.
func (t *tokens) revoke(token string) {
	c, err := t.verify(token)
	if err != nil {
		return // it has ended already
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.verified, token)
	t.revoked[c] = true
	time.AfterFunc(time.Until(time.Unix(c.Expires, 0)), func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.revoked, c)
	})
}

// jwk is the public key as others read it, to verify tokens on their own
// (RFC 7517 §4, RFC 7518 §6.3.1).
func (t *tokens) jwk() map[string]string {
	encode := base64.RawURLEncoding.EncodeToString
	exponent := big.NewInt(int64(t.key.E))
	return map[string]string{
		"kty": "RSA", "use": "sig", "alg": "RS256",
		"n": encode(t.key.N.Bytes()), "e": encode(exponent.Bytes()),
	}
}

const minKeyBits = 2048

// readKey reads an RSA private key of at least 2048 bits, in PEM of PKCS #8 or
// PKCS #1. Where there is no file it returns fs.ErrNotExist.
func readKey(path string) (*rsa.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("is not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	}
	private, ok := key.(*rsa.PrivateKey)
	switch {
	case err != nil || !ok:
		return nil, errors.New("is not a valid RSA private key without a passphrase")
	case private.N.BitLen() < minKeyBits:
		return nil, fmt.Errorf("has %d bits, and %d are the least", private.N.BitLen(), minKeyBits)
	}
	return private, nil
}

// isPrivate reports whether only its owner can read a file. Windows does not
// say.
func isPrivate(path string) bool {
	info, err := os.Stat(path)
	return err == nil && (info.Mode()&0o077 == 0 || runtime.GOOS == "windows")
}

// makeKey makes a key and keeps it in a file that only its owner can read.
func makeKey(path string) (*rsa.PrivateKey, error) {
	key, err := rsa.GenerateKey(rand.Reader, minKeyBits)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	err = disk(nil).replace(path, func(w io.Writer) error {
		return pem.Encode(w, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	})
	return key, err
}
