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
	"maps"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const jackID = "7ovnkm2y3"

// TestToken compares a token with what openssl makes of the same claims. In
// synctest the clock starts in the year 2000.
func TestToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := newTokens(rfcKey(t))
		jack := claims{Expires: 946685400, UserID: jackID, Email: "jack-black@codementor.io", Name: "Zoë & Jack"}
		token := sign(t, keys, jack)
		want := encode(`{"typ":"JWT","alg":"RS256"}`) + "." +
			encode(`{"exp":946685400,"id":"7ovnkm2y3","email":"jack-black@codementor.io","name":"Zoë \u0026 Jack"}`) + "." +
			strip(opensslSignature)
		if token != want {
			t.Errorf("got %s, want %s", token, want)
		}
		checkValid(t, keys, token, jack)
		checkValid(t, keys, token, jack) // now from memory
		checkInvalid(t, "another key", newTokens(testKey(t, "other-pkcs1.pem")), token)
		if got, want := jack.id(), (tokenID{UserID: jackID, Expires: 946685400}); got != want {
			t.Errorf("id: got %v, want %v", got, want)
		}
		if _, err := newTokens(&rsa.PrivateKey{PublicKey: rfcKey(t).PublicKey}).sign(jack); err == nil {
			t.Error("sign with half a key: got no error")
		}
	})
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

// TestRFC7515 checks the key and the signature of appendix A.2. Our server rejects
// that token, as its header has no typ.
func TestRFC7515(t *testing.T) {
	token := strip(rfcToken)
	unsigned := token[:strings.LastIndex(token, ".")]
	if got := signWith(t, rfcKey(t), crypto.SHA256, unsigned); got != token {
		t.Errorf("got %s, want %s", got, token)
	}
	checkInvalid(t, "the token of the RFC", newTokens(rfcKey(t)), token)
}

// All the forged tokens are made from the good one. It expires at the end of 2099,
// and is the same in every process, as fuzzing needs. In base64 its claims have a
// '_' and unused bits at the end.
const goodPayload = `{"exp":4102444800,"id":"7ovnkm2y3","email":"a?b??c???d@example.com","name":"Zoë"}`

var goodClaims = claims{Expires: 4102444800, UserID: jackID, Email: "a?b??c???d@example.com", Name: "Zoë"}

func goodToken(t testing.TB) string { return signed(t, tokenHeader+encode(goodPayload)) }

// forgeries returns tokens that are never accepted, by name. Unless the name says
// otherwise, they have a valid signature by our key: only what the name says is
// wrong with them.
func forgeries(t testing.TB) map[string]string {
	token, key, other := goodToken(t), rfcKey(t), testKey(t, "other-pkcs1.pem")
	signed := func(unsigned string) string { return signWith(t, key, crypto.SHA256, unsigned) }
	parts := strings.Split(token, ".")
	header, payload, signature := parts[0], parts[1], parts[2]
	all := make(map[string]string)
	add := func(kind, what, forged string) {
		if forged == token {
			t.Errorf("%s %q: it is the good token", kind, what)
		}
		all[fmt.Sprintf("%s %q", kind, what)] = forged
	}

	alg := func(name string) string { return encode(`{"typ":"JWT","alg":"`+name+`"}`) + "." + payload }
	pkcs1 := x509.MarshalPKCS1PublicKey(&key.PublicKey)
	pkix, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, secret := range map[string][]byte{
		"nothing": nil, "modulus": key.N.Bytes(), "DER": pkix, "DER of PKCS #1": pkcs1,
		"PEM": []byte(pemText("PUBLIC KEY", pkix)), "PEM of PKCS #1": []byte(pemText("RSA PUBLIC KEY", pkcs1)),
	} {
		for _, unsigned := range []string{alg("HS256"), alg("RS256")} {
			mac := hmac.New(sha256.New, secret)
			mac.Write([]byte(unsigned))
			add("HMAC, the secret is our "+name+", of", unsigned, unsigned+"."+encode(string(mac.Sum(nil))))
		}
	}
	for _, unsigned := range []string{alg("PS256"), alg("RS384"), alg("RS512"), alg("RS256")} {
		digest := sha256.Sum256([]byte(unsigned))
		pss, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], nil)
		if err != nil {
			t.Fatal(err)
		}
		add("signed with PSS:", unsigned, unsigned+"."+encode(string(pss)))
		add("signed with SHA-384:", unsigned, signWith(t, key, crypto.SHA384, unsigned))
		add("signed with SHA-512:", unsigned, signWith(t, key, crypto.SHA512, unsigned))
		add("signed with another key:", unsigned, signWith(t, other, crypto.SHA256, unsigned))
	}
	for _, name := range []string{"none", "None", "NONE", "nOnE", "", "rs256"} {
		add("not signed, alg", name, alg(name)+".")
		add("with the signature of the good token, alg", name, alg(name)+"."+signature)
		add("signed, alg", name, signed(alg(name)))
	}
	for _, header := range []string{
		`{}`, `{"alg":"RS256"}`, `{"typ":"JWT"}`, `{"typ":"at+jwt","alg":"RS256"}`, `{"alg":"RS256","typ":"JWT"}`,
		`{"typ":"JWT", "alg":"RS256"}`, `{"typ":"JWT","alg":"RS256"}` + "\n", `{"typ":"JWT","alg":"none","alg":"RS256"}`,
		`{"typ":"JWT","alg":"RS256","kid":"/dev/null"}`, `{"typ":"JWT","alg":"RS256","jku":"http://localhost/"}`,
		`{"typ":"JWT","alg":"RS256","x5u":"http://localhost/"}`, `{"typ":"JWT","alg":"RS256","crit":["b64"],"b64":true}`,
		`{"typ":"JWT","alg":"RS256","jwk":{"kty":"RSA","n":"` + strip(rfcModulus) + `","e":"AQAB"}}`,
	} {
		add("header", header, signed(encode(header)+"."+payload))
	}
	// edited replaces one part of the good claims.
	edited := func(from, to string) string { return strings.Replace(goodPayload, from, to, 1) }
	texts := []string{
		``, `null`, `{}`, `exp=4102444800`, `[` + goodPayload + `]`, strconv.Quote(goodPayload),
		goodPayload + goodPayload, goodPayload + "\n", "\ufeff" + goodPayload,
		`{"id":"7ovnkm2y3","exp":4102444800,"email":"a@example.com","name":"Zoë"}`,
		edited(`,`, `, `), edited(`}`, `,"admin":true}`), edited(`Z`, `\u005a`), edited(`ë`, "\xff"), edited(`ë`, `\ud800`),
		edited(`"id":"7ovnkm2y3",`, ``), edited(`"id":`, `"id":"7ovnkm2y4","id":`), edited(`"id"`, `"ID"`),
		edited(`"exp":4102444800,`, ``), edited(`"exp":`, `"exp":1,"exp":`), edited(`"exp"`, `"EXP"`), edited(`,"name":"Zoë"`, ``),
	}
	for id := range strings.FieldsSeq(`7 null "" "0" "7OVNKM2Y3" "7ovnkm2y" "7ovnkm2y33" "7ovnkm2y\n" "zovnkm2y3"`) {
		texts = append(texts, edited(`"7ovnkm2y3"`, id))
	}
	for exp := range strings.FieldsSeq(`"4102444800" null true 1e10 4102444800.0 0 -4102444800 946684800 9223372036854775808`) {
		texts = append(texts, edited(`4102444800`, exp))
	}
	for _, text := range texts {
		add("claims", text, signed(tokenHeader+encode(text)))
	}
	for _, shape := range []string{
		"", ".", "..", "...", "null", header, header + "." + payload, signed(header), signed("." + payload),
		signed(header + "." + payload + "." + payload), token + "." + signature, token + "," + token,
	} {
		add("token", shape, shape)
	}
	separators := []string{"\r", "\n", "\r\n", " ", "\x00", "."}
	for _, c := range separators {
		add("before the token", c, c+token)
		add("in the header", c, signed(header[:8]+c+header[8:]+"."+payload))
	}
	// variants are what careless decoders take for the same part.
	variants := func(part string) []string {
		last := len(part) - 1
		list := []string{
			part + "==",
			strings.NewReplacer("-", "+", "_", "/").Replace(part), // base64's other alphabet
			part[:last] + string(part[last]+1),                    // sets one of the last bits, which mean nothing
		}
		for _, c := range separators {
			list = append(list, c+part, part[:8]+c+part[8:], part+c)
		}
		return list
	}
	for _, part := range append(variants(payload), "") {
		add("encoded claims", part, signed(tokenHeader+part))
	}
	overflow := new(big.Int).Add(bigInt(t, signature), key.N)
	for _, part := range append(variants(signature), "", encode(strings.Repeat("\x00", 256)),
		encode("\x00"+string(decode(t, signature))), encode(string(overflow.Bytes())), strings.Split(signed(header), ".")[1]) {
		add("signature", part, header+"."+payload+"."+part)
	}
	return all
}

// FuzzVerify verifies the forged tokens, and, with -fuzz, what is made of them.
func FuzzVerify(f *testing.F) {
	keys, good := newTokens(rfcKey(f)), goodToken(f)
	checkValid(f, keys, good, goodClaims)
	for name, token := range forgeries(f) {
		f.Add(name, token)
	}
	f.Fuzz(func(t *testing.T, name, token string) {
		if token == good {
			t.Skip("it is the good token")
		}
		checkInvalid(t, name, keys, token)
		checkInvalid(t, name+" again", keys, token)
		if len(keys.verified) != 1 {
			t.Errorf("remembered tokens: got %d, want 1", len(keys.verified))
		}
	})
}

// TestAlteredToken alters the good token at each of its bytes.
func TestAlteredToken(t *testing.T) {
	keys, token := newTokens(rfcKey(t)), goodToken(t)
	check := func(altered string) {
		if altered != token {
			checkInvalid(t, strconv.Quote(altered), keys, altered)
		}
	}
	for i := range len(token) {
		check(token[:i])
		check(token[i+1:])
		check(token[:i] + token[i+1:])
		check(token[:i] + string(token[i]^1) + token[i+1:])
		for _, c := range "Aw.=\r\n\x00" {
			check(token[:i] + string(c) + token[i+1:])
			check(token[:i] + string(c) + token[i:])
		}
	}
	check(strings.ToLower(token))
	check(strings.ToUpper(token))
}

func TestLongTokens(t *testing.T) {
	c := goodClaims
	c.Name = strings.Repeat("Z", 5859-len(goodPayload)+len(c.Name)) // makes 5859 bytes of claims
	keys := newTokens(rfcKey(t))
	longest := sign(t, keys, c)
	if len(longest) != 8<<10 {
		t.Errorf("got %d bytes, want 8 KiB", len(longest))
	}
	checkValid(t, keys, longest, c)
	c.Name += "Z"
	checkInvalid(t, "more than 8 KiB", keys, sign(t, keys, c))

	for _, token := range []string{
		strip(rfcToken), // its header alone is enough to reject it
		strings.Repeat(".", 900<<10),
		tokenHeader + strings.Repeat(".", 900<<10),
		tokenHeader + "e30." + strings.Repeat("A", 900<<10),
		tokenHeader + strings.Repeat("A", 900<<10) + goodToken(t)[len(tokenHeader):],
	} {
		checkInvalid(t, token[:60], keys, token)
		if got := testing.AllocsPerRun(5, func() { keys.verify(token) }); got != 0 {
			t.Errorf("%.60s…: got %v allocations, want 0", token, got)
		}
	}
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, c := newTokens(rfcKey(t)), claims{Expires: time.Now().Unix() + 600, UserID: jackID}
		token := sign(t, keys, c)
		for _, wait := range []time.Duration{0, 10*time.Minute - time.Nanosecond} {
			time.Sleep(wait)
			checkValid(t, keys, token, c)
			checkValid(t, newTokens(rfcKey(t)), token, c)
		}
		for _, wait := range []time.Duration{time.Nanosecond, 24 * time.Hour} {
			time.Sleep(wait)
			checkInvalid(t, "remembered, after "+wait.String(), keys, token)
			checkInvalid(t, "new, after "+wait.String(), newTokens(rfcKey(t)), token)
		}
	})
}

func TestRememberedTokens(t *testing.T) {
	keys, most := newTokens(rfcKey(t)), 0
	for i := range 25_000 {
		keys.remember(strconv.Itoa(i), goodClaims)
		most = max(most, len(keys.verified))
	}
	if most != 10_000 {
		t.Errorf("most remembered tokens: got %d, want 10000", most)
	}
	checkValid(t, keys, goodToken(t), goodClaims)
	keys.key = new(rsa.PrivateKey) // cannot verify a signature
	checkValid(t, keys, goodToken(t), goodClaims)
	clear(keys.verified)
	checkInvalid(t, "not remembered", keys, goodToken(t))
}

func TestTokensConcurrently(t *testing.T) {
	keys, good := newTokens(rfcKey(t)), goodToken(t)
	atOnce(8, func(worker int) {
		for i := range 20 {
			c := claims{Expires: 4102444800, UserID: fmt.Sprintf("7%04d%04d", worker, i)}
			token, err := keys.sign(c)
			if err != nil {
				t.Error(err)
			}
			checkValid(t, keys, token, c)
			checkValid(t, keys, good, goodClaims)
		}
	})
}

// TestPublicKey verifies a token as another service does, with the published key.
func TestPublicKey(t *testing.T) {
	got := newTokens(rfcKey(t)).jwk()
	want := map[string]string{"kty": "RSA", "use": "sig", "alg": "RS256", "n": strip(rfcModulus), "e": "AQAB"}
	if !maps.Equal(got, want) { // so there is no d, p or q
		t.Errorf("got %v, want %v", got, want)
	}
	key := rsa.PublicKey{N: bigInt(t, got["n"]), E: int(bigInt(t, got["e"]).Int64())}
	checkValid(t, newTokens(&rsa.PrivateKey{PublicKey: key}), goodToken(t), goodClaims)
}

// TestReadKey reads keys as openssl writes them, and other files.
func TestReadKey(t *testing.T) {
	const (
		accepted = ""
		notPEM   = "not a PEM file; remove it to get a new key, or choose another file"
		notRSA   = "not an unencrypted RSA private key; choose another file"
		small    = "only 1024 bits; choose a key of 2048 or more"
	)
	good := readFile(t, rfcKeyFile)
	pkcs1 := x509.MarshalPKCS1PrivateKey(rfcKey(t))
	damaged := bytes.Clone(pkcs1)
	damaged[100] ^= 1 // in the modulus
	key := func(name string) string { return readFile(t, "testdata/keys/"+name) }
	for _, file := range []struct{ want, content string }{
		{accepted, good},
		{accepted, strings.ReplaceAll(good, "\n", "\r\n")},
		{accepted, "Idea Pool\n" + good},
		{accepted, pemText("RSA PRIVATE KEY", pkcs1)},
		{small, key("1024.pem")},
		{small, key("1024-pkcs1.pem")},
		{"only 2047 bits; choose a key of 2048 or more", key("2047.pem")},
		{notPEM, ""},
		{notPEM, "correct horse\n"},
		{notPEM, string(pkcs1)},
		{notPEM, good[:800]},
		{notRSA, key("encrypted.pem")},
		{notRSA, key("encrypted-pkcs1.pem")},
		{notRSA, key("ec.pem")},
		{notRSA, key("ec-pkcs8.pem")},
		{notRSA, key("ed25519.pem")},
		{notRSA, key("certificate.pem")},
		{notRSA, key("public.pem")},
		{notRSA, key("public-pkcs1.pem")},
		{notRSA, pemText("RSA PRIVATE KEY", damaged)},
		{notRSA, pemText("PRIVATE KEY", []byte("correct horse"))},
		{notRSA, pemText("RSA PRIVATE KEY", []byte("correct horse"))},
	} {
		path := filepath.Join(t.TempDir(), "key.pem")
		writeFile(t, path, file.content)
		before := filesIn(t, path)
		got, err := readKey(path)
		if file.want == accepted && (err != nil || !got.Equal(rfcKey(t))) {
			t.Errorf("%.40q: got the error %v, want the key of the RFC", file.content, err)
		}
		if file.want != accepted && (got != nil || fmt.Sprint(err) != file.want) {
			t.Errorf("%.40q: got key %t, error %v, want error %s", file.content, got != nil, err, file.want)
		}
		if after := filesIn(t, path); after != before {
			t.Errorf("%.40q: got the file %s, want %s", file.content, after, before)
		}
	}
}

// TestMakeKey makes a key in a directory that holds other files: a crash has left the
// first, and somebody a link.
func TestMakeKey(t *testing.T) {
	directory := t.TempDir()
	path := filepath.Join(directory, "key.pem")
	if _, err := readKey(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before: got %v, want %v", err, fs.ErrNotExist)
	}
	writeFile(t, path+".1234567890.tmp", "half a key")
	if err := symlink("key.pem.1234567890.tmp", path+".tmp"); err != nil {
		t.Log("this system has no links:", err)
	}
	before := filesIn(t, directory)
	t.Setenv("TMPDIR", path+".missing") // may be another file system, so makeKey must not use it
	key, err := makeKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if key.N.BitLen() != 2048 || key.E != 65537 {
		t.Errorf("got %d bits, exponent %d, want 2048 bits, exponent 65537", key.N.BitLen(), key.E)
	}
	if got, err := readKey(path); err != nil || !got.Equal(key) {
		t.Errorf("readKey: got error %v, want the key that was made", err)
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
	if key, err := makeKey(filepath.Join(directory, "missing", "key.pem")); err == nil || key != nil {
		t.Errorf("no directory: got key %v, error %v, want %v", key != nil, err, fs.ErrNotExist)
	}
}

// TestNoRoomForAKey starts the command where no file may become larger than a block
// of 512 or 1024 bytes.
func TestNoRoomForAKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	command := exec.Command("sh", "-c", `ulimit -f 1 && exec "$0" "$@"`, os.Args[0], "-addr=localhost:0", "-data=", "-key", path)
	command.Env = append(os.Environ(), serveEnv+"=1")
	output, err := command.CombinedOutput()
	if command.ProcessState.ExitCode() != 1 {
		t.Skip("this system has no such limit:", err)
	}
	if want := "ideapool: -key " + path + ": write "; !strings.HasPrefix(string(output), want) {
		t.Errorf("got %s, want %s…", output, want)
	}
	if left := filesIn(t, filepath.Dir(path)); strings.Count(left, "\n") != 1 {
		t.Errorf("got the files\n%s\nwant only the directory", left)
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

// signed appends a signature to a header and claims, whatever they are.
func signed(t testing.TB, unsigned string) string {
	return signWith(t, rfcKey(t), crypto.SHA256, unsigned)
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

func decode(t testing.TB, s string) []byte {
	t.Helper()
	data, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func bigInt(t testing.TB, s string) *big.Int { return new(big.Int).SetBytes(decode(t, s)) }

func pemText(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// strip joins lines, which the RFC breaks for display only.
func strip(s string) string { return strings.NewReplacer("\n", "", "\t", "").Replace(s) }

// The modulus of rfcKey.
const rfcModulus = `
	ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpa
	SHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ`

// The token of RFC 7515 §A.2.1.
const rfcToken = `
	eyJhbGciOiJSUzI1NiJ9.
	eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.
	cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARN
	PvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw`

// The signature of TestToken's token by openssl dgst -sha256 -sign.
const opensslSignature = `
	UDcbjlp9WtuxKxq_-U98HOAVvvDGwjtXG-mdY-xRe5uynvNQI3wVTbyRjtZDfijaOJPi9f3a7aE36P2KNRWfTDyS7AK_hiTyqtaOODQNng6EH-7LviEfu19Bvja3cScPr7Twp7B-EQwGj_aIGNfB7-Gc7AwjEAe6m-FS1C5AgTDn
	n3BZ7mrD2jNNEBgucQzhVIFASOhtvUMvbNp4sRJMifNI6nxt27l_ytZXwlFf4qIb3PgZVdskbIgeCK-Uz43kzHVjOjfjnPLKeuKubVyR2Oc2YHoS52S_qVsU1gpURtO0lZczj1-hiOCUsLV6Xe_e9qbOwxxefUsoQT9yeRrtiA`
