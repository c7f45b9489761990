package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
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
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestToken has a clock that starts with the year 2000, as all of synctest.
func TestToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(999 * time.Millisecond) // exp is in whole seconds
		keys := newTokens(rfcKey(), 10*time.Minute)
		token, err := keys.sign(claims{UserID: jackID, Email: "jack-black@codementor.io", Name: "Zoë & Jack"})
		if err != nil {
			t.Fatal(err)
		}
		parts := strings.Split(token, ".")
		if len(parts) != 3 {
			t.Fatalf("%d parts: %s", len(parts), token)
		}
		if got, want := decode(parts[0]), `{"typ":"JWT","alg":"RS256"}`; got != want {
			t.Errorf("header %s, want %s", got, want)
		}
		if got, want := decode(parts[1]), `{"exp":946685400,"id":"7ovnkm2y3",`+
			`"email":"jack-black@codementor.io","name":"Zoë \u0026 Jack"}`; got != want {
			t.Errorf("claims %s, want %s", got, want)
		}
		if want := strip(opensslToken); token != want {
			t.Errorf("openssl dgst -sha256 -sign makes another token:\n got %s\nwant %s", token, want)
		}
		for range 2 { // the second time from memory
			if g, err := keys.verify(token); g.UserID != jackID || g.Expires != 946685400 || err != nil {
				t.Errorf("verify gave %v, %v", g, err)
			}
		}
		if _, err := newTokens(otherKey(), 10*time.Minute).verify(token); err != errToken {
			t.Errorf("with another key: %v", err)
		}
	})
}

// TestRFC7515 checks the key and the signature of appendix A.2. That token is
// not one of ours, as its header has no typ.
func TestRFC7515(t *testing.T) {
	token := strip(rfcToken)
	input := token[:strings.LastIndex(token, ".")]
	if got := signWith(rfcKey(), crypto.SHA256, input); got != token {
		t.Errorf("signed:\n got %s\nwant %s", got, token)
	}
	if _, err := newTokens(rfcKey(), time.Hour).verify(token); err != errToken {
		t.Errorf("verify: %v", err)
	}
}

var jackID = parseSerial("7ovnkm2y3")

// The good token, from which all the forged ones are made. It ends with the
// year 2099, and is the same in every process, as fuzzing needs. Its claims
// make base64 with a '_' and with unused bits at the end.
const goodClaims = `{"exp":4102444800,"id":"7ovnkm2y3","email":"a?b??c???d@example.com","name":"Zoë"}`

func goodToken() string { return signed(tokenHeader + encode(goodClaims)) }

type forgery struct{ name, token string }

// forgeries are tokens that are refused for ever. Unless their names say
// otherwise they are truly signed with our key: only what the name says is
// wrong with them.
func forgeries() []forgery {
	good, key := goodToken(), rfcKey()
	parts := strings.Split(good, ".")
	header, payload, signature := parts[0], parts[1], parts[2]

	withHeader := func(header string) string { return signed(encode(header) + "." + payload) }
	withClaims := func(claims string) string { return signed(tokenHeader + encode(claims)) }
	withSignature := func(signature string) string { return header + "." + payload + "." + signature }
	// edited has one place of the good claims replaced.
	edited := func(from, to string) string { return withClaims(strings.Replace(goodClaims, from, to, 1)) }
	// stray has one of the last bits set that mean nothing.
	stray := func(part string) string {
		last := len(part) - 1
		return part[:last] + string(part[last]+1)
	}
	// standard is in base64's other alphabet.
	standard := strings.NewReplacer("-", "+", "_", "/").Replace

	alg := func(name string) string { return encode(`{"typ":"JWT","alg":"`+name+`"}`) + "." + payload }
	hs256 := func(input string, secret []byte) string {
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(input))
		return input + "." + encode(string(mac.Sum(nil)))
	}
	ps256 := func(input string) string {
		digest := sha256.Sum256([]byte(input))
		return input + "." + encode(string(must(rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], nil))))
	}
	pkcs1, pkix := x509.MarshalPKCS1PublicKey(&key.PublicKey), must(x509.MarshalPKIXPublicKey(&key.PublicKey))

	list := []forgery{
		{"empty", ""},
		{"a dot", "."},
		{"two dots", ".."},
		{"three dots", "..."},
		{"null", "null"},

		{"one part", header},
		{"two parts", header + "." + payload},
		{"two parts, signed", signed(header)},
		{"no header", signed("." + payload)},
		{"no claims", signed(tokenHeader)},
		{"no signature", header + "." + payload + "."},
		{"a part more at the end", good + "." + signature},
		{"a part more in the middle", signed(header + "." + payload + "." + payload)},
		{"two tokens", good + "," + good},

		{"HS256, the secret is our PEM", hs256(alg("HS256"), pemText("PUBLIC KEY", pkix))},
		{"HS256, the secret is our PEM of PKCS #1", hs256(alg("HS256"), pemText("RSA PUBLIC KEY", pkcs1))},
		{"HS256, the secret is our DER", hs256(alg("HS256"), pkix)},
		{"HS256, the secret is our DER of PKCS #1", hs256(alg("HS256"), pkcs1)},
		{"HS256, the secret is our modulus", hs256(alg("HS256"), key.N.Bytes())},
		{"HS256, the secret is empty", hs256(alg("HS256"), nil)},
		{"HS256 under our header", hs256(alg("RS256"), pemText("PUBLIC KEY", pkix))},
		{"PS256", ps256(alg("PS256"))},
		{"PS256 under our header", ps256(alg("RS256"))},
		{"RS384", signWith(key, crypto.SHA384, alg("RS384"))},
		{"RS384 under our header", signWith(key, crypto.SHA384, alg("RS256"))},
		{"RS512", signWith(key, crypto.SHA512, alg("RS512"))},
		{"RS512 under our header", signWith(key, crypto.SHA512, alg("RS256"))},
		{"signed with another key", signWith(otherKey(), crypto.SHA256, alg("RS256"))},
		{"signature of other claims", withSignature(strings.Split(edited("7", "8"), ".")[2])},
		{"signature of zeros", withSignature(encode(strings.Repeat("\x00", 256)))},
		{"signature with a zero before", withSignature(encode("\x00" + decode(signature)))},
		{"signature plus the modulus", withSignature(encode(string(new(big.Int).Add(bigInt(signature), key.N).Bytes())))},

		{"header of {}", withHeader(`{}`)},
		{"header without typ", withHeader(`{"alg":"RS256"}`)},
		{"header without alg", withHeader(`{"typ":"JWT"}`)},
		{"header with alg twice", withHeader(`{"typ":"JWT","alg":"none","alg":"RS256"}`)},
		{"header with alg in lower case", withHeader(`{"typ":"JWT","alg":"rs256"}`)},
		{"header with another typ", withHeader(`{"typ":"at+jwt","alg":"RS256"}`)},
		{"header in another order", withHeader(`{"alg":"RS256","typ":"JWT"}`)},
		{"header with a space", withHeader(`{"typ":"JWT", "alg":"RS256"}`)},
		{"header with a line end", withHeader(`{"typ":"JWT","alg":"RS256"}` + "\n")},
		{"header with kid", withHeader(`{"typ":"JWT","alg":"RS256","kid":"/dev/null"}`)},
		{"header with jwk", withHeader(`{"typ":"JWT","alg":"RS256","jwk":` + strip(rfcJWK) + `}`)},
		{"header with jku", withHeader(`{"typ":"JWT","alg":"RS256","jku":"http://localhost/"}`)},
		{"header with x5u", withHeader(`{"typ":"JWT","alg":"RS256","x5u":"http://localhost/"}`)},
		{"header with crit", withHeader(`{"typ":"JWT","alg":"RS256","crit":["b64"],"b64":true}`)},

		{"claims padded", signed(tokenHeader + payload + "==")},
		{"claims in the other alphabet", signed(tokenHeader + standard(payload))},
		{"claims with stray bits", signed(tokenHeader + stray(payload))},
		{"signature padded", good + "=="},
		{"signature in the other alphabet", withSignature(standard(signature))},
		{"signature with stray bits", withSignature(stray(signature))},

		{"claims are no JSON", withClaims(`exp=4102444800`)},
		{"claims are empty", withClaims(``)},
		{"claims are null", withClaims(`null`)},
		{"claims are {}", withClaims(`{}`)},
		{"claims are an array", withClaims(`[` + goodClaims + `]`)},
		{"claims are a string", withClaims(strconv.Quote(goodClaims))},
		{"claims come twice", withClaims(goodClaims + goodClaims)},
		{"claims with a blank", edited(`,`, `, `)},
		{"claims with LF after", withClaims(goodClaims + "\n")},
		{"claims with a byte order mark", withClaims("\ufeff" + goodClaims)},
		{"claims in another order", withClaims(`{"id":"7ovnkm2y3","exp":4102444800,"email":"a@example.com","name":"Zoë"}`)},
		{"claims with one more", edited(`}`, `,"admin":true}`)},
		{"claims with one less", edited(`,"name":"Zoë"`, ``)},
		{"claims in a needless escape", edited(`Z`, `\u005a`)},
		{"claims in invalid UTF-8", edited(`ë`, "\xff")},
		{"claims with half a surrogate pair", edited(`ë`, `\ud800`)},
		{"id twice", edited(`"id":`, `"id":"7ovnkm2y4","id":`)},
		{"id in upper case", edited(`"id"`, `"ID"`)},
		{"id a number", edited(`"7ovnkm2y3"`, `7`)},
		{"id in capitals", edited(`"7ovnkm2y3"`, `"7OVNKM2Y3"`)},
		{"id too short", edited(`"7ovnkm2y3"`, `"0"`)},
		{"exp missing", edited(`"exp":4102444800,`, ``)},
		{"exp twice", edited(`"exp":`, `"exp":1,"exp":`)},
		{"exp in upper case", edited(`"exp"`, `"EXP"`)},
		{"exp a string", edited(`4102444800`, `"4102444800"`)},
		{"exp null", edited(`4102444800`, `null`)},
		{"exp 1e10", edited(`4102444800`, `1e10`)},
		{"exp a float", edited(`4102444800`, `4102444800.0`)},
		{"exp true", edited(`4102444800`, `true`)},
		{"exp 0", edited(`4102444800`, `0`)},
		{"exp negative", edited(`4102444800`, `-4102444800`)},
		{"exp 2^63", edited(`4102444800`, `9223372036854775808`)},
		{"exp in the past", edited(`4102444800`, `946684800`)},
	}
	for _, name := range []string{"none", "None", "NONE", "nOnE", ""} {
		list = append(list,
			forgery{"alg " + name + ", not signed", alg(name) + "."},
			forgery{"alg " + name + ", the signature of the good token", alg(name) + "." + signature},
			forgery{"alg " + name + ", signed", signed(alg(name))})
	}
	for _, c := range []string{"\r", "\n", "\r\n", " ", "\x00", "."} {
		list = append(list,
			forgery{fmt.Sprintf("%q before", c), c + good},
			forgery{fmt.Sprintf("%q after", c), good + c},
			forgery{fmt.Sprintf("%q in the header", c), signed(header[:8] + c + header[8:] + "." + payload)},
			forgery{fmt.Sprintf("%q in the claims", c), signed(tokenHeader + payload[:8] + c + payload[8:])},
			forgery{fmt.Sprintf("%q in the signature", c), withSignature(signature[:8] + c + signature[8:])})
	}
	return list
}

func TestForgedTokens(t *testing.T) {
	keys, good := newTokens(rfcKey(), time.Hour), goodToken()
	if _, err := keys.verify(good); err != nil {
		t.Fatal("the good token:", err)
	}
	list := forgeries()
	for _, test := range list {
		if test.token == good {
			t.Errorf("%s: it is the good token", test.name)
		}
		for range 2 { // nothing about the first time is remembered
			if g, err := keys.verify(test.token); err != errToken || g != (claims{}) {
				t.Errorf("%s: got %v, %v", test.name, g, err)
			}
		}
	}
	for _, test := range list {
		keys.revoke(test.token)
	}
	if len(keys.verified) != 1 || len(keys.revoked) != 0 {
		t.Errorf("after all that, %d are verified and %d revoked", len(keys.verified), len(keys.revoked))
	}
}

// TestAlteredToken damages the good token at each of its bytes.
func TestAlteredToken(t *testing.T) {
	keys, good := newTokens(rfcKey(), time.Hour), goodToken()
	refused := func(token string) {
		if _, err := keys.verify(token); err != errToken && token != good {
			t.Errorf("%q: got %v", token, err)
		}
	}
	for i := range len(good) {
		refused(good[:i])
		refused(good[i+1:])
		refused(good[:i] + good[i+1:])
		refused(good[:i] + string(good[i]^1) + good[i+1:])
		for _, c := range "Aw.=\r\n\x00" {
			refused(good[:i] + string(c) + good[i+1:])
			refused(good[:i] + string(c) + good[i:])
		}
	}
	refused(strings.ToLower(good))
	refused(strings.ToUpper(good))
}

func TestLongTokens(t *testing.T) {
	named := func(length int) string {
		return signed(tokenHeader + encode(strings.Replace(goodClaims, "Zoë", strings.Repeat("Z", length), 1)))
	}
	// 5859 bytes of claims make 8 KiB of token.
	length := 5859 - len(strings.Replace(goodClaims, "Zoë", "", 1))
	keys, longest := newTokens(rfcKey(), time.Hour), named(length)
	if _, err := keys.verify(longest); err != nil || len(longest) != 8<<10 {
		t.Errorf("of %d bytes: %v", len(longest), err)
	}
	if _, err := keys.verify(named(length + 1)); err != errToken {
		t.Errorf("of more than 8 KiB: %v", err)
	}

	for _, token := range []string{
		strings.Repeat(".", 900<<10),
		tokenHeader + strings.Repeat(".", 900<<10),
		tokenHeader + "e30." + strings.Repeat("A", 900<<10),
		tokenHeader + strings.Repeat("A", 900<<10) + goodToken()[len(tokenHeader):],
	} {
		allocations := testing.AllocsPerRun(5, func() {
			if _, err := keys.verify(token); err != errToken {
				t.Errorf("%.60s…: %v", token, err)
			}
		})
		if allocations != 0 {
			t.Errorf("%.60s…: it took memory %v times to refuse it", token, allocations)
		}
	}
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := newTokens(rfcKey(), 10*time.Minute)
		for offset, want := range map[int64]error{-3600: errToken, -1: errToken, 0: errToken, 1: nil, 3600: nil} {
			exp := strconv.FormatInt(time.Now().Unix()+offset, 10)
			token := signed(tokenHeader + encode(strings.Replace(goodClaims, "4102444800", exp, 1)))
			if _, err := keys.verify(token); err != want {
				t.Errorf("exp = now%+d: got %v, want %v", offset, err, want)
			}
		}

		// A token is made at 0.3 s, and so it ends 0.3 s early.
		time.Sleep(300 * time.Millisecond)
		token := must(keys.sign(claims{UserID: jackID}))
		check := func(when string, want error) {
			for name, keys := range map[string]*tokens{
				"remembered": keys,
				"fresh":      newTokens(rfcKey(), time.Minute), // the ttl at verifying is irrelevant
			} {
				if _, err := keys.verify(token); err != want {
					t.Errorf("%s, %s: got %v, want %v", when, name, err, want)
				}
			}
		}
		check("at once", nil)
		time.Sleep(10*time.Minute - 300*time.Millisecond - time.Nanosecond)
		check("1 ns before exp", nil)
		time.Sleep(time.Nanosecond)
		check("at exp", errToken)
		time.Sleep(24 * time.Hour)
		check("a day later", errToken)
	})
}

func TestRevoke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := newTokens(rfcKey(), 10*time.Minute)
		jack, jill := claims{UserID: jackID}, claims{UserID: jackID + 1}
		older, others := must(keys.sign(jack)), must(keys.sign(jill))
		time.Sleep(time.Second)
		token := must(keys.sign(jack))
		time.Sleep(time.Second)
		newer := must(keys.sign(jack))

		check := func(when, name, token string, want error) {
			t.Helper()
			if _, err := keys.verify(token); err != want {
				t.Errorf("%s: %s: got %v, want %v", when, name, err, want)
			}
		}
		checkAll := func(when string, want error) {
			t.Helper()
			for range 2 { // the second time from memory
				check(when, "the token", token, want)
				check(when, "one a second older", older, nil)
				check(when, "one a second newer", newer, nil)
				check(when, "another user's", others, nil)
			}
		}
		checkRevoked := func(when string, want int) {
			t.Helper()
			keys.mu.RLock()
			defer keys.mu.RUnlock()
			if got := len(keys.revoked); got != want {
				t.Errorf("%s: %d tokens are remembered as revoked, want %d", when, got, want)
			}
		}

		checkAll("at first", nil)
		keys.revoke(token)
		checkAll("revoked", errToken)
		keys.revoke(token)
		checkAll("revoked again", errToken)
		clear(keys.verified)
		checkAll("with nothing remembered", errToken)
		for i := range 10_000 {
			keys.admit(strconv.Itoa(i), claims{})
		}
		checkAll("with other things remembered", errToken)

		time.Sleep(10*time.Minute - time.Second - time.Nanosecond)
		check("1 ns before its end", "the token", token, errToken)
		checkRevoked("1 ns before its end", 1)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		check("at its end", "the token", token, errToken)
		check("at its end", "one a second older", older, errToken)
		check("at its end", "one a second newer", newer, nil)
		keys.revoke(token)
		checkRevoked("at its end", 0)
	})
}

func TestRevokeThenSignAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := newTokens(rfcKey(), 10*time.Minute)
		jack := claims{UserID: jackID}
		token := must(keys.sign(jack))
		for range 3 {
			keys.revoke(token)
			if _, err := keys.verify(token); err != errToken {
				t.Errorf("revoked: got %v", err)
			}
			if again := must(keys.sign(jack)); again != token {
				t.Error("two tokens for one user within a second")
			}
			if _, err := keys.verify(token); err != nil {
				t.Errorf("signed again: got %v", err)
			}
		}
		keys.revoke(token)
		time.Sleep(time.Second)
		must(keys.sign(jack)) // another one
		if _, err := keys.verify(token); err != errToken {
			t.Errorf("revoked, and another one signed a second later: got %v", err)
		}
	})
}

func TestRememberedTokens(t *testing.T) {
	keys, good := newTokens(rfcKey(), time.Hour), goodToken()
	most := 0
	for i := range 25_000 {
		keys.admit(strconv.Itoa(i), claims{UserID: jackID, Expires: 4102444800})
		most = max(most, len(keys.verified))
	}
	if most != 10_000 {
		t.Errorf("at most %d tokens are remembered, want 10,000", most)
	}
	want, err := keys.verify(good)
	if err != nil {
		t.Fatal(err)
	}

	// Without a key no signature can be verified, nor has it to be.
	keys.key = new(rsa.PrivateKey)
	if g, err := keys.verify(good); g != want || err != nil {
		t.Errorf("remembered: %v, %v", g, err)
	}
	clear(keys.verified)
	if _, err := keys.verify(good); err != errToken {
		t.Errorf("forgotten, and without a key: %v", err)
	}
}

func TestTokensConcurrently(t *testing.T) {
	keys, good := newTokens(rfcKey(), time.Hour), goodToken()
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 20 {
				token, err := keys.sign(claims{UserID: jackID + serial(100*worker+i)})
				if err != nil {
					t.Error(err)
				}
				if _, err := keys.verify(token); err != nil {
					t.Errorf("signed: %v", err)
				}
				keys.revoke(token)
				if _, err := keys.verify(token); err != errToken {
					t.Errorf("revoked: %v", err)
				}
				if _, err := keys.verify(good); err != nil {
					t.Errorf("the good token: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

// TestPublicKey is what another service does with the key that we publish.
func TestPublicKey(t *testing.T) {
	text := must(json.Marshal(newTokens(rfcKey(), time.Hour).jwk()))
	var got, rfc map[string]string
	if err := errors.Join(json.Unmarshal(text, &got), json.Unmarshal([]byte(strip(rfcJWK)), &rfc)); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"kty": "RSA", "use": "sig", "alg": "RS256", "n": rfc["n"], "e": rfc["e"]}
	if !maps.Equal(got, want) { // so there is no d, p or q
		t.Errorf("got %s, want %s", got, want)
	}
	key := rsa.PublicKey{N: bigInt(got["n"]), E: int(bigInt(got["e"]).Int64())}
	if !key.Equal(&rfcKey().PublicKey) {
		t.Errorf("it is another key: %s", text)
	}
	if _, err := newTokens(&rsa.PrivateKey{PublicKey: key}, time.Hour).verify(goodToken()); err != nil {
		t.Errorf("with the published key: %v", err)
	}
}

func TestReadKey(t *testing.T) {
	pkcs8 := func(key any) []byte { return pemText("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(key))) }
	rsaBits := func(bits int) *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, bits)) }
	key := otherKey()
	pkcs1 := x509.MarshalPKCS1PrivateKey(key)
	ec := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	certificate := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	damaged := bytes.Clone(pkcs1)
	damaged[100] ^= 1 // in the modulus

	const notRSA = "is not a valid RSA private key without a passphrase"
	const weak = "bits, and 2048 are the least"
	for _, test := range []struct {
		name string
		file []byte
		want string // part of the error
	}{
		{"PKCS #8", pkcs8(key), ""},
		{"PKCS #1", pemText("RSA PRIVATE KEY", pkcs1), ""},
		{"CRLF", bytes.ReplaceAll(pkcs8(key), []byte("\n"), []byte("\r\n")), ""},
		{"words before it", append([]byte("Idea Pool\n"), pkcs8(key)...), ""},
		{"1024 bits", pkcs8(rsaBits(1024)), "has 1024 " + weak},
		{"1024 bits, PKCS #1", pemText("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaBits(1024))), "has 1024 " + weak},
		{"2047 bits", pkcs8(rsaBits(2047)), "has 2047 " + weak},
		{"encrypted, PKCS #8", []byte(encryptedPKCS8), notRSA},
		{"encrypted, PKCS #1", []byte(encryptedPKCS1), notRSA},
		{"EC, PKCS #8", pkcs8(ec), notRSA},
		{"EC", pemText("EC PRIVATE KEY", must(x509.MarshalECPrivateKey(ec))), notRSA},
		{"Ed25519", pkcs8(ed), notRSA},
		{"a certificate", pemText("CERTIFICATE", certificate), notRSA},
		{"a public key", pemText("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(&key.PublicKey))), notRSA},
		{"a public key, PKCS #1", pemText("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&key.PublicKey)), notRSA},
		{"DER", must(x509.MarshalPKCS8PrivateKey(key)), "is not PEM"},
		{"garbage", []byte("correct horse battery staple\n"), "is not PEM"},
		{"an empty file", nil, "is not PEM"},
		{"half a file", pkcs8(key)[:800], "is not PEM"},
		{"garbage in PEM", pemText("PRIVATE KEY", []byte("correct horse")), notRSA},
		{"garbage in PEM, PKCS #1", pemText("RSA PRIVATE KEY", []byte("correct horse")), notRSA},
		{"a modulus that is not p times q", pemText("RSA PRIVATE KEY", damaged), notRSA},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "key.pem")
			old := time.Unix(1e9, 0)
			if err := errors.Join(os.WriteFile(path, test.file, 0o640), os.Chtimes(path, old, old)); err != nil {
				t.Fatal(err)
			}
			before := must(os.Stat(path))
			got, err := readKey(path)
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want == "" && !got.Equal(key):
				t.Error("read another key")
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("got %v, want an error with %q", err, test.want)
			case test.want != "" && got != nil:
				t.Error("got a key beside the error")
			}
			after, content := must(os.Stat(path)), must(os.ReadFile(path))
			if !bytes.Equal(content, test.file) || after.Mode() != before.Mode() || !after.ModTime().Equal(old) {
				t.Error("the file was touched")
			}
		})
	}

	// Only a file that is not there may be made.
	if _, err := readKey(t.TempDir()); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder: %v", err)
	}
	if _, err := readKey(filepath.Join(t.TempDir(), "key.pem")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestMakeKey(t *testing.T) {
	folder := t.TempDir()
	path := filepath.Join(folder, "key.pem")
	// A crash long ago left a file that others can read.
	if err := os.WriteFile(path+".tmp", []byte("half a key"), 0o644); err != nil {
		t.Fatal(err)
	}
	key, err := makeKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if key.N.BitLen() != 2048 || key.E != 65537 {
		t.Errorf("made a key of %d bits with exponent %d", key.N.BitLen(), key.E)
	}
	if got, err := readKey(path); err != nil || !got.Equal(key) {
		t.Errorf("does not read back: %v", err)
	}
	if !bytes.HasPrefix(must(os.ReadFile(path)), []byte("-----BEGIN PRIVATE KEY-----\n")) {
		t.Error("is not PEM of PKCS #8")
	}
	if mode := must(os.Stat(path)).Mode(); mode != 0o600 && runtime.GOOS != "windows" {
		t.Errorf("mode %v", mode)
	}
	if files := must(os.ReadDir(folder)); len(files) != 1 {
		t.Errorf("left behind: %v", files)
	}
	if _, err := makeKey(filepath.Join(folder, "missing", "key.pem")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a missing folder: %v", err)
	}
}

func FuzzVerify(f *testing.F) {
	keys, good := newTokens(rfcKey(), time.Hour), goodToken()
	f.Add(good)
	for _, seed := range forgeries() {
		f.Add(seed.token)
	}
	f.Fuzz(func(t *testing.T, token string) {
		g, err := keys.verify(token)
		switch {
		case token == good && (err != nil || g.UserID != jackID || g.Expires != 4102444800):
			t.Errorf("the good token: got %v, %v", g, err)
		case token != good && (err != errToken || g != claims{}):
			t.Errorf("a forged token: got %v, %v", g, err)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	keys, good := newTokens(rfcKey(), time.Hour), goodToken()
	verify := func(b *testing.B) {
		if _, err := keys.verify(good); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("remembered", func(b *testing.B) {
		for b.Loop() {
			verify(b)
		}
	})
	b.Run("first time", func(b *testing.B) {
		for b.Loop() {
			delete(keys.verified, good)
			verify(b)
		}
	})
}

func BenchmarkSign(b *testing.B) {
	keys := newTokens(rfcKey(), time.Hour)
	for b.Loop() {
		if _, err := keys.sign(claims{0, jackID, "jack-black@codementor.io", "Jack Black"}); err != nil {
			b.Fatal(err)
		}
	}
}

// signed appends a signature to a header and claims, whatever they are.
func signed(input string) string { return signWith(rfcKey(), crypto.SHA256, input) }

func signWith(key *rsa.PrivateKey, hash crypto.Hash, input string) string {
	digest := hash.New()
	digest.Write([]byte(input))
	return input + "." + encode(string(must(rsa.SignPKCS1v15(nil, key, hash, digest.Sum(nil)))))
}

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func decode(s string) string { return string(must(base64.RawURLEncoding.DecodeString(s))) }

func bigInt(s string) *big.Int { return new(big.Int).SetBytes([]byte(decode(s))) }

func pemText(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// strip joins lines, which the RFC breaks for display only.
func strip(s string) string { return strings.NewReplacer("\n", "", "\t", "").Replace(s) }

// rfcKey is the key of RFC 7515 §A.2.1, ours in all these tests.
var rfcKey = sync.OnceValue(func() *rsa.PrivateKey {
	var jwk struct{ N, E, D, P, Q string }
	if err := json.Unmarshal([]byte(strip(rfcJWK)), &jwk); err != nil {
		panic(err)
	}
	key := &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: bigInt(jwk.N), E: int(bigInt(jwk.E).Int64())},
		D:         bigInt(jwk.D),
		Primes:    []*big.Int{bigInt(jwk.P), bigInt(jwk.Q)},
	}
	key.Precompute()
	return key
})

var otherKey = sync.OnceValue(func() *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, 2048)) })

// The key of RFC 7515 §A.2.1.
const rfcJWK = `{"kty":"RSA",
	"n":"ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm
	4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMd
	bBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DW
	NmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ",
	"e":"AQAB",
	"d":"Eq5xpGnNCivDflJsRQBXHx1hdR1k6Ulwe2JZD50LpXyWPEAeP88vLNO97IjlA7_GQ5sLKMgvfTeXZx9SE-7YwVol2NX
	OoAJe46sui395IW_GO-pWJ1O0BkTGoVEn2bKVRUCgu-GjBVaYLU6f3l9kJfFNS3E0QbVdxzubSu3Mkqzjkn439X0M_V51gfp
	RLI9JYanrC4D4qAdGcopV_0ZHHzQlBjudU2QvXt4ehNYTCBr6XCLQUShb1juUO1ZdiYoFaFQT5Tw8bGUl_x_jTj3ccPDVZFD
	9pIuhLhBOneufuBiB4cS98l2SR_RQyGWSeWjnczT0QU91p1DhOVRuOopznQ",
	"p":"4BzEEOtIpmVdVEZNCqS7baC4crd0pqnRH_5IB3jw3bcxGn6QLvnEtfdUdiYrqBdss1l58BQ3KhooKeQTa9AB0Hw_Py5
	PJdTJNPY8cQn7ouZ2KKDcmnPGBY5t7yLc1QlQ5xHdwW1VhvKn-nXqhJTBgIPgtldC-KDV5z-y2XDwGUc",
	"q":"uQPEfgmVtjL0Uyyx88GZFF1fOunH3-7cepKmtH4pxhtCoHqpWmT8YAmZxaewHgHAjLYsp1ZSe7zFYHj7C6ul7TjeLQe
	ZD_YwD66t62wDmpe_HlB-TnBA-njbglfIsRLtXlnDzQkv5dTltRJ11BKBBypeeF6689rjcJIDEz9RWdc"}`

// The token of RFC 7515 §A.2.1.
const rfcToken = `
	eyJhbGciOiJSUzI1NiJ9.
	eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.
	cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujG
	bds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K
	0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6
	LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw`

// The token of TestToken, signed by openssl dgst -sha256 -sign.
const opensslToken = `
	eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9.
	eyJleHAiOjk0NjY4NTQwMCwiaWQiOiI3b3Zua20yeTMiLCJlbWFpbCI6ImphY2stYmxhY2tAY29kZW1lbnRvci5pbyIsIm5h
	bWUiOiJab8OrIFx1MDAyNiBKYWNrIn0.
	UDcbjlp9WtuxKxq_-U98HOAVvvDGwjtXG-mdY-xRe5uynvNQI3wVTbyRjtZDfijaOJPi9f3a7aE36P2KNRWfTDyS7AK_hiTy
	qtaOODQNng6EH-7LviEfu19Bvja3cScPr7Twp7B-EQwGj_aIGNfB7-Gc7AwjEAe6m-FS1C5AgTDnn3BZ7mrD2jNNEBgucQzh
	VIFASOhtvUMvbNp4sRJMifNI6nxt27l_ytZXwlFf4qIb3PgZVdskbIgeCK-Uz43kzHVjOjfjnPLKeuKubVyR2Oc2YHoS52S_
	qVsU1gpURtO0lZczj1-hiOCUsLV6Xe_e9qbOwxxefUsoQT9yeRrtiA`

// Keys behind a passphrase, as openssl writes them.
const (
	encryptedPKCS8 = `-----BEGIN ENCRYPTED PRIVATE KEY-----
MIIBvTBXBgkqhkiG9w0BBQ0wSjApBgkqhkiG9w0BBQwwHAQIOjTGCYJ+40cCAggA
MAwGCCqGSIb3DQIJBQAwHQYJYIZIAWUDBAEqBBDYuwGweUqvdwR9E9c5H/JkBIIB
YGPJZDxEBkj76nM3a6lO5h8PkOGEcKoODX6uOAq2RtO6D95SVMsP1Qv6d2ngpYmh
ogCzlIfd3iB+JAwfM+MR2GM3zvJCa/8heYl6G3PtgOW84Q2NutOH7hAPi1LqxWNK
SFHy2SUTwq4k9RBMyExU3RHN+2fVl12iJb3R/6WQdcc/Ub5RwXYw+V5+7sZEYMLL
lMy+KC1yxuDxUOQ4mQVF26O/l8wWF7b0hbszNcWrkCFWIULlM6oCbbQ785X6et0Q
K0BrpotxcbYm0PfxyVSMNuHCKvuOPG2U3uUf9+/MbviEtVU9gwKbvvfZBkEDFAtl
M5IiuMroDWsZ+x2pzqOP7jIjLyitZRykWTZplBEQoxYWWmWe/6uYuyvu9n76dOKL
mz9ruJhMSZ5INUX0iau7y9YJVSYgasHH8JM1EdQdTQ16GeeUXXny6ua8GdomKve6
AMc4U/dwRGpIr21i0bH0Jl4=
-----END ENCRYPTED PRIVATE KEY-----
`
	encryptedPKCS1 = `-----BEGIN RSA PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,E3E18897A2529EA356EF66FEAB59FA39

40kG0J21ud9zFfQw9wLRlmNq9joxGfIhaLQF5OfJcGUUqhRylhrzgCmVvsB0ebbO
MOrl6DVu7ZdEiAENT6NNGroGsJkqx47M7RXzTSvpmR/pTv8Yuobe2jkOpDchdXFi
/8f9O/SG+TRYReICkApLq3zm/0xgC62Ty9FRvXu6Umn7Uhit0fiOw6cyql/hb8/P
09CjQCO5RMWDl72ao3rdPbaO9dadKK0P81K+mt0atIoOhN1Q1BV8NmCFdXipGtAS
DMjsjk9ga/g3t7qYwkrmRxc9J5W13uzxiY/f1ZD/Rhp0t3Ys/pVEssOzzNxPITKH
VwFZqoFYu7h5jehK6ta9XDPZF67paAsw1ey2iLt950Xzqn1ChT8wI+mh/a00x9qf
ufyhIBkvpqR4gOkkY4tUgXBgXYVgHPwdlSsAAi7ooCCg53NhPJl6oDgFeaVd9Ldr
-----END RSA PRIVATE KEY-----
`
)
