package main

import (
	"bytes"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

const otherKeyFile = "testdata/keys/other-pkcs1.pem"

// The claims of a good token, from which the forged ones are made. It expires at the end
// of 2099. In base64, the claims have a '_' and unused bits at the end.
var goodClaims = claims{Expires: 4102444800, UserID: "7ovnkm2y3", Email: "a?b??c???d@example.com", Name: "Zoë & J"}

const goodPayload = `{"exp":4102444800,"id":"7ovnkm2y3","email":"a?b??c???d@example.com","name":"Zoë \u0026 J"}`

// TestToken compares a token with what openssl makes of the same claims, by
// openssl dgst -sha256 -sign testdata/keys/rfc7515.pem.
func TestToken(t *testing.T) {
	keys := newTokens(rfcKey(t))
	got := sign(t, keys, goodClaims)
	want := encode(`{"typ":"JWT","alg":"RS256"}`) + "." + encode(goodPayload) + "." +
		"GnvmkMBY-4gnrL0FkakkXkWqMhShs2AnzmCdniZ0ZOlcgpldUmtEPGlqLdTEG7v4a3df0PoWwZWYDwUKcsapcU" +
		"XskRB_9rWIqmvbnR2q0-vxjjK4rHdz7OgHJL0us_xGOGQsXOnc8uo90XCXKQ6TOcMBc_DoDvq7feeVGw2w-A8N" +
		"iW40GNSeITuUKwZYu4nvIikVkhcSfMwYkkLvn6xdjVZ5hM-_vIXRH0A_A__pBwW0G7OosdWWuKUBuPU01uUMbL" +
		"jUgTnozuAUucgfjBrf09edDRLA0RnTBHbyvcQVJjUroI43JsBrGKRt24tHL3-RkJwznWNmEgYr3c1864gGFQ"
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	checkValid(t, keys, got, goodClaims)
	checkInvalid(t, "another key", newTokens(testKey(t, otherKeyFile)), got)
}

func checkValid(t testing.TB, keys *tokens, token string, want claims) {
	t.Helper()
	if got, err := keys.verify(token); got != want || err != nil {
		t.Errorf("got %v, %v, want %v, nil", got, err, want)
	}
}

func checkInvalid(t testing.TB, name string, keys *tokens, token string) {
	t.Helper()
	if got, err := keys.verify(token); got != (claims{}) || err != errToken {
		t.Errorf("%s: got %v, %v, want no claims, %v", name, got, err, errToken)
	}
}

// forgeries returns tokens that are never accepted. Unless its name says otherwise,
// a token has a valid signature by our key, and only what the name says is wrong.
func forgeries(t testing.TB) map[string]string {
	key, otherKey := rfcKey(t), testKey(t, otherKeyFile)
	good := sign(t, newTokens(key), goodClaims)
	parts := strings.Split(good, ".")
	header, payload, signature := parts[0], parts[1], parts[2]
	unsigned := header + "." + payload
	sha := func(unsigned string) string { return signWith(t, key, crypto.SHA256, unsigned) }
	withClaims := func(text string) string { return sha(header + "." + encode(text)) }
	edited := func(from, to string) string { return withClaims(strings.Replace(goodPayload, from, to, 1)) }
	withSignature := func(s string) string { return unsigned + "." + s }

	none := encode(`{"typ":"JWT","alg":"none"}`) + "." + payload + "."
	hs256 := encode(`{"typ":"JWT","alg":"HS256"}`) + "." + payload
	publicKey := pemText("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&key.PublicKey))
	mac := hmac.New(sha256.New, []byte(publicKey))
	mac.Write([]byte(hs256))
	digest := sha256.Sum256([]byte(unsigned))
	pss, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], nil)
	if err != nil {
		t.Fatal(err)
	}
	standardAlphabet := strings.NewReplacer("-", "+", "_", "/")

	all := map[string]string{
		"nothing":                         "",
		"no signature":                    unsigned,
		"the signature of something else": withSignature(strings.Split(sha("x.y"), ".")[2]),
		"alg none, without a signature":   none,
		"alg none, signed":                sha(strings.TrimSuffix(none, ".")),
		"HMAC, the secret is our key":     hs256 + "." + encode(string(mac.Sum(nil))),
		"PSS":                             withSignature(encode(string(pss))),
		"SHA-512":                         signWith(t, key, crypto.SHA512, unsigned),
		"signed with another key":         signWith(t, otherKey, crypto.SHA256, unsigned),
		"a header that names a key":       sha(encode(`{"typ":"JWT","alg":"RS256","kid":"/dev/null"}`) + "." + payload),

		"null as claims":      withClaims("null"),
		"claims twice":        withClaims(goodPayload + goodPayload),
		"claims with a blank": edited(`,`, `, `),
		"another claim":       edited(`}`, `,"admin":true}`),
		"an escaped letter":   edited(`Z`, `\u005a`),
		"invalid UTF-8":       edited(`ë`, "\xff"),
		"no name":             edited(`,"name":"Zoë \u0026 J"`, ``),
		"no id":               edited(`"id":"7ovnkm2y3",`, ``),
		"two ids":             edited(`"id":`, `"id":"7ovnkm2y4","id":`),
		"the claim ID":        edited(`"id"`, `"ID"`),
		"an id with an A":     edited(`7ovnkm2y3`, `7ovnkm2A3`),
		"no exp":              edited(`"exp":4102444800,`, ``),
		"text as exp":         edited(`4102444800`, `"4102444800"`),
		"an expired token":    edited(`4102444800`, `946684800`),

		"a blank before the token":     " " + good,
		"a line end after it":          good + "\n",
		"a fourth part":                good + "." + signature,
		"a line end in the claims":     sha(header + "." + payload[:8] + "\n" + payload[8:]),
		"a line end in the signature":  withSignature(signature[:8] + "\n" + signature[8:]),
		"padding of the claims":        sha(unsigned + "=="),
		"padding of the signature":     withSignature(signature + "=="),
		"claims in other base64":       sha(header + "." + standardAlphabet.Replace(payload)),
		"signature in other base64":    withSignature(standardAlphabet.Replace(signature)),
		"unused bits of the claims":    sha(unsigned[:len(unsigned)-1] + string(unsigned[len(unsigned)-1]+1)),
		"unused bits of the signature": withSignature(signature[:len(signature)-1] + string(signature[len(signature)-1]+1)),
	}
	for name, token := range all {
		if token == good {
			t.Errorf("%s: it is the good token", name)
		}
	}
	return all
}

// FuzzVerify verifies the forged tokens, and, with -fuzz, what is made of them.
func FuzzVerify(f *testing.F) {
	keys := newTokens(rfcKey(f))
	good := sign(f, keys, goodClaims)
	for name, token := range forgeries(f) {
		f.Add(name, token)
	}
	f.Fuzz(func(t *testing.T, name, token string) {
		if token == good {
			t.Skip("it is the good token")
		}
		checkInvalid(t, name, keys, token)
		if len(keys.verified) != 0 {
			t.Errorf("%s: it is remembered", name)
		}
	})
}

// TestAlteredToken alters the good token at each of its bytes.
func TestAlteredToken(t *testing.T) {
	keys := newTokens(rfcKey(t))
	good := sign(t, keys, goodClaims)
	for i := range len(good) {
		before, after := good[:i], good[i+1:]
		checkInvalid(t, fmt.Sprint("up to byte ", i), keys, before)
		checkInvalid(t, fmt.Sprint("without byte ", i), keys, before+after)
		checkInvalid(t, fmt.Sprint("another byte ", i), keys, before+string(good[i]^1)+after)
	}
}

// TestRememberedTokens verifies tokens at once. A good one is remembered, so that its
// signature is verified only once. At most 10,000 are.
func TestRememberedTokens(t *testing.T) {
	keys := newTokens(rfcKey(t))
	good := sign(t, keys, goodClaims)
	atOnce(4, func(n int) {
		c := claims{Expires: 4102444800, UserID: fmt.Sprint("7ovnkm2y", n)}
		token, err := keys.sign(c)
		if err != nil {
			t.Error(err)
		}
		checkValid(t, keys, token, c)
		checkValid(t, keys, good, goodClaims)
	})
	keys.key = new(rsa.PrivateKey) // cannot verify a signature
	checkValid(t, keys, good, goodClaims)
	for n := range 10_000 {
		keys.remember(strconv.Itoa(n), goodClaims)
	}
	if n := len(keys.verified); n > 10_000 {
		t.Errorf("%d tokens are remembered, want at most 10,000", n)
	}
	checkInvalid(t, "forgotten", keys, good)
}

// TestReadKey reads keys as openssl writes them, and other files.
func TestReadKey(t *testing.T) {
	const (
		accepted = "<nil>"
		notPEM   = "not a PEM file; remove it to get a new key, or choose another file"
		notRSA   = "not an unencrypted RSA private key; choose another file"
	)
	good := readFile(t, rfcKeyFile)
	pkcs1 := x509.MarshalPKCS1PrivateKey(rfcKey(t))
	damaged := bytes.Clone(pkcs1)
	damaged[100] ^= 1 // in the modulus
	for _, file := range []struct{ want, content string }{
		{accepted, good},
		{accepted, strings.ReplaceAll(good, "\n", "\r\n")},
		{accepted, "Idea Pool\n" + good},
		{accepted, pemText("RSA PRIVATE KEY", pkcs1)},
		{"only 2047 bits; choose a key of 2048 or more", readFile(t, "testdata/keys/2047.pem")},
		{notPEM, ""},
		{notPEM, string(pkcs1)},
		{notPEM, good[:800]},
		{notRSA, readFile(t, "testdata/keys/encrypted.pem")},
		{notRSA, readFile(t, "testdata/keys/ec-pkcs8.pem")},
		{notRSA, readFile(t, "testdata/keys/certificate.pem")},
		{notRSA, pemText("RSA PRIVATE KEY", damaged)},
	} {
		path := filepath.Join(t.TempDir(), "key.pem")
		writeFile(t, path, file.content)
		key, err := readKey(path)
		if fmt.Sprint(err) != file.want || (key != nil) != (err == nil) || err == nil && !key.Equal(rfcKey(t)) {
			t.Errorf("%.40q: got key %t, error %v, want %s", file.content, key != nil, err, file.want)
		}
	}
}

// TestMakeKey makes a key in a directory in which a crash has left another file.
func TestMakeKey(t *testing.T) {
	directory := t.TempDir()
	path := filepath.Join(directory, "key.pem")
	if _, err := readKey(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before: got %v, want %v", err, fs.ErrNotExist)
	}
	writeFile(t, path+".1234567890.tmp", "half a key")
	before := filesIn(t, directory)
	t.Setenv("TMPDIR", path+".missing") // may be another file system, so makeKey must not use it
	key, err := makeKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := readKey(path); err != nil || !got.Equal(key) || key.N.BitLen() != 2048 {
		t.Errorf("got %d bits, and readKey the error %v, want the key that was made, of 2048 bits", key.N.BitLen(), err)
	}
	file := filesIn(t, path)
	if !strings.Contains(file, "-----BEGIN PRIVATE KEY-----\\n") {
		t.Errorf("got %s, want PEM of PKCS #8", file)
	}
	if !strings.Contains(file, " -rw-------\n") && runtime.GOOS != "windows" {
		t.Errorf("got %s, want the mode -rw-------", file)
	}
	if others := strings.Replace(filesIn(t, directory), file, "", 1); others != before {
		t.Errorf("other files: got %s, want %s", others, before)
	}
}

func sign(t testing.TB, keys *tokens, c claims) string {
	t.Helper()
	token, err := keys.sign(c)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func signWith(t testing.TB, key *rsa.PrivateKey, hash crypto.Hash, unsigned string) string {
	t.Helper()
	digest := hash.New()
	digest.Write([]byte(unsigned))
	signature, err := rsa.SignPKCS1v15(nil, key, hash, digest.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	return unsigned + "." + encode(string(signature))
}

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func pemText(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}
