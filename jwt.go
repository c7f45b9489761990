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
	"io/fs"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// tokenHeader is {"typ":"JWT","alg":"RS256"} and a dot, the only header there
// is. A token with another one is rejected before any of it is decoded: there
// is no alg to confuse, and no kid, jwk or jku to obey (RFC 8725 §3.1).
const tokenHeader = "eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9."

// tokens makes and verifies access tokens: JSON Web Tokens (RFC 7519), signed
// with RS256, which is RSASSA-PKCS1-v1_5 with SHA-256 (RFC 7518 §3.3).
type tokens struct {
	key *rsa.PrivateKey

	mu sync.RWMutex
	// verified remembers good tokens: verifying a signature costs more than the rest
	// of a request.
	verified map[string]claims
}

// claims are what a token says, in the order of the API document.
type claims struct {
	Expires int64  `json:"exp"` // Unix time
	UserID  string `json:"id"`
	Email   string `json:"email"`
	Name    string `json:"name"`
}

func (c claims) id() tokenID { return tokenID{UserID: c.UserID, Expires: c.Expires} }

// errToken is for a token that is missing, invalid, expired or logged out. Clients
// compare these words, which are the original API's, and then refresh the token.
var errToken = &apiError{status: http.StatusUnauthorized, Reason: "you can not pass!"}

func newTokens(key *rsa.PrivateKey) *tokens {
	return &tokens{key: key, verified: make(map[string]claims)}
}

// sign makes a token.
func (t *tokens) sign(c claims) (string, error) {
	unsigned := c.unsigned()
	digest := sha256.Sum256([]byte(unsigned))
	signature, err := rsa.SignPKCS1v15(nil, t.key, crypto.SHA256, digest[:])
	return unsigned + "." + base64.RawURLEncoding.EncodeToString(signature), err
}

// unsigned is a token up to its signature.
func (c claims) unsigned() string {
	payload, _ := json.Marshal(c) // never fails: it is text and a number
	return tokenHeader + base64.RawURLEncoding.EncodeToString(payload)
}

// verify returns what a token says, or errToken, whatever is wrong with it.
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
	if time.Now().Unix() >= c.Expires { // rejected at that very second (RFC 7519 §4.1.4)
		return claims{}, errToken
	}
	if !known {
		t.remember(token, c)
	}
	return c, nil
}

// parse checks everything about a token that does not change with time. It trusts
// nothing before it has verified the signature.
func (t *tokens) parse(token string) (claims, error) {
	encoded, ok := strings.CutPrefix(token, tokenHeader)
	if !ok {
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
	payload, err := base64.RawURLEncoding.DecodeString(encodedPayload)
	if err != nil {
		return claims{}, err
	}
	var c claims
	if err := json.Unmarshal(payload, &c); err != nil {
		return claims{}, err
	}
	// The token must be what sign would make of its claims: so no claim is missing,
	// given twice or of another type, and there are no line ends or last bits that
	// base64 skips.
	if !idShape.MatchString(c.UserID) || token != c.unsigned()+"."+base64.RawURLEncoding.EncodeToString(signature) {
		return claims{}, errToken
	}
	return c, nil
}

func (t *tokens) remember(token string, c claims) {
	const limit = 10_000 // then all are forgotten
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.verified) >= limit {
		clear(t.verified)
	}
	t.verified[token] = c
}

// A caller is who sent a request: a user, and the access token that says so.
type caller struct {
	user
	token tokenID
}

// private wraps a handler that needs a logged-in user.
func (s *server) private(h func(http.ResponseWriter, *http.Request, caller) error) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		c, err := s.tokens.verify(accessToken(r.Header))
		if err != nil {
			return err
		}
		u, ok := s.store.activeUser(c.id())
		if !ok {
			return errToken
		}
		return h(w, r, caller{u, c.id()})
	}
}

// accessToken returns the token in X-Access-Token or, if there is no such header, in
// Authorization (RFC 6750 §2.1), there after Bearer, in upper or lower case (RFC 9110
// §11.1). X-Access-Token may have the word, too.
func accessToken(h http.Header) string {
	value := h.Get("X-Access-Token")
	_, given := h["X-Access-Token"]
	if !given {
		value = h.Get("Authorization")
	}
	scheme, token, _ := strings.Cut(value, " ")
	switch {
	case strings.EqualFold(scheme, "Bearer"):
		return strings.TrimLeft(token, " ")
	case given:
		return value
	}
	return ""
}

// jwks responds to GET /.well-known/jwks.json (RFC 7517 §5). With it other
// services can verify tokens but not make them, which is what RS256 is for.
func (s *server) jwks(w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]any{"keys": []any{s.tokens.jwk()}})
}

// jwk returns the public key as a JSON Web Key, with which others can verify
// tokens (RFC 7517 §4, RFC 7518 §6.3.1).
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
// PKCS #1. If there is no file, it returns fs.ErrNotExist.
func readKey(path string) (*rsa.PrivateKey, error) {
	path, err := realPath(path)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("not a PEM file; remove it to get a new key, or choose another file")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	}
	rsaKey, ok := key.(*rsa.PrivateKey)
	switch {
	case err != nil || !ok:
		return nil, errors.New("not an unencrypted RSA private key; choose another file")
	case rsaKey.N.BitLen() < minKeyBits:
		return nil, fmt.Errorf("only %d bits; choose a key of %d or more", rsaKey.N.BitLen(), minKeyBits)
	}
	return rsaKey, nil
}

// makeKey makes a key and saves it in a new file that only its owner can read.
func makeKey(path string) (*rsa.PrivateKey, error) {
	path, err := realPath(path)
	if err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, minKeyBits)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name()) // unless it was renamed
	err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return nil, err
	}
	return key, os.Rename(f.Name(), path)
}

// realPath returns the absolute path of a file that may not exist yet, without
// symbolic links. It rejects what is not a regular file before anything is opened:
// opening a named pipe blocks.
func realPath(name string) (string, error) {
	name, err := filepath.Abs(name)
	if err != nil {
		return "", err
	}
	if _, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		directory, err := filepath.EvalSymlinks(filepath.Dir(name))
		return filepath.Join(directory, filepath.Base(name)), err
	}
	if name, err = filepath.EvalSymlinks(name); err != nil {
		return "", err
	}
	info, err := os.Stat(name)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("not a regular file (its mode is %s); choose another one", info.Mode())
	}
	return name, err
}
