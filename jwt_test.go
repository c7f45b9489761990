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
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const jackID = "7ovnkm2y3"

// TestToken compares a token with what openssl makes of the same claims. In
// synctest the clock starts in the year 2000.
func TestToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := newTokens(rfcKey())
		jack := claims{Expires: 946685400, UserID: jackID, Email: "jack-black@codementor.io", Name: "Zoë & Jack"}
		token := must(keys.sign(jack))
		want := encode(`{"typ":"JWT","alg":"RS256"}`) + "." +
			encode(`{"exp":946685400,"id":"7ovnkm2y3","email":"jack-black@codementor.io","name":"Zoë \u0026 Jack"}`) + "." +
			strip(opensslSignature)
		if token != want {
			t.Errorf("got %s, want %s", token, want)
		}
		checkValid(t, keys, token, jack)
		checkValid(t, keys, token, jack) // now from memory
		checkInvalid(t, "another key", newTokens(otherKey()), token)
		if got, want := jack.id(), (tokenID{UserID: jackID, Expires: 946685400}); got != want {
			t.Errorf("id: got %v, want %v", got, want)
		}
		if _, err := newTokens(&rsa.PrivateKey{PublicKey: rfcKey().PublicKey}).sign(jack); err == nil {
			t.Error("sign with half a key: got no error")
		}
	})
}

func checkValid(t *testing.T, keys *tokens, token string, want claims) {
	t.Helper()
	if got, err := keys.verify(token); got != want || err != nil {
		t.Errorf("got %v, %v, want %v, nil", got, err, want)
	}
}

func checkInvalid(t *testing.T, name string, keys *tokens, token string) {
	t.Helper()
	if got, err := keys.verify(token); got != (claims{}) || err != errToken {
		t.Errorf("%s: got %v, %v, want no claims, %v", name, got, err, errToken)
	}
}

// TestRFC7515 checks the key and the signature of appendix A.2. Our server rejects
// that token, as its header has no typ.
func TestRFC7515(t *testing.T) {
	token := strip(rfcToken)
	input := token[:strings.LastIndex(token, ".")]
	if got := signWith(rfcKey(), crypto.SHA256, input); got != token {
		t.Errorf("got %s, want %s", got, token)
	}
	checkInvalid(t, "the token of the RFC", newTokens(rfcKey()), token)
}

// All the forged tokens are made from the good one. It expires at the end of 2099,
// and is the same in every process, as fuzzing needs. In base64 its claims have a
// '_' and unused bits at the end.
const goodPayload = `{"exp":4102444800,"id":"7ovnkm2y3","email":"a?b??c???d@example.com","name":"Zoë"}`

var goodClaims = claims{Expires: 4102444800, UserID: jackID, Email: "a?b??c???d@example.com", Name: "Zoë"}

func goodToken() string { return signed(tokenHeader + encode(goodPayload)) }

// forgeries returns tokens that are never accepted, by name. Unless the name says
// otherwise, they have a valid signature by our key: only what the name says is
// wrong with them.
func forgeries() map[string]string {
	token, key := goodToken(), rfcKey()
	parts := strings.Split(token, ".")
	header, payload, signature := parts[0], parts[1], parts[2]
	all := make(map[string]string)
	add := func(kind, what, token string) { all[fmt.Sprintf("%s %q", kind, what)] = token }

	alg := func(name string) string { return encode(`{"typ":"JWT","alg":"`+name+`"}`) + "." + payload }
	pkcs1, pkix := x509.MarshalPKCS1PublicKey(&key.PublicKey), must(x509.MarshalPKIXPublicKey(&key.PublicKey))
	for name, secret := range map[string][]byte{
		"nothing": nil, "modulus": key.N.Bytes(), "DER": pkix, "DER of PKCS #1": pkcs1,
		"PEM": pemText("PUBLIC KEY", pkix), "PEM of PKCS #1": pemText("RSA PUBLIC KEY", pkcs1),
	} {
		for _, input := range []string{alg("HS256"), alg("RS256")} {
			mac := hmac.New(sha256.New, secret)
			mac.Write([]byte(input))
			add("HMAC, the secret is our "+name+", of", input, input+"."+encode(string(mac.Sum(nil))))
		}
	}
	for _, input := range []string{alg("PS256"), alg("RS384"), alg("RS512"), alg("RS256")} {
		digest := sha256.Sum256([]byte(input))
		pss := must(rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], nil))
		add("signed with PSS:", input, input+"."+encode(string(pss)))
		add("signed with SHA-384:", input, signWith(key, crypto.SHA384, input))
		add("signed with SHA-512:", input, signWith(key, crypto.SHA512, input))
		add("signed with another key:", input, signWith(otherKey(), crypto.SHA256, input))
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
		`{"typ":"JWT","alg":"RS256","jwk":` + strip(rfcJWK) + `}`,
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
	for _, other := range []string{
		"", ".", "..", "...", "null", header, header + "." + payload, signed(header), signed("." + payload),
		signed(header + "." + payload + "." + payload), token + "." + signature, token + "," + token,
	} {
		add("token", other, other)
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
	overflow := new(big.Int).Add(bigInt(signature), key.N)
	for _, part := range append(variants(signature), "", encode(strings.Repeat("\x00", 256)),
		encode("\x00"+decode(signature)), encode(string(overflow.Bytes())), strings.Split(signed(header), ".")[1]) {
		add("signature", part, header+"."+payload+"."+part)
	}
	return all
}

func TestForgedTokens(t *testing.T) {
	keys := newTokens(rfcKey())
	checkValid(t, keys, goodToken(), goodClaims)
	for name, token := range forgeries() {
		if token == goodToken() {
			t.Errorf("%s: it is the good token", name)
		}
		checkInvalid(t, name, keys, token)
		checkInvalid(t, name+" again", keys, token)
	}
	if len(keys.verified) != 1 {
		t.Errorf("remembered tokens: got %d, want 1", len(keys.verified))
	}
}

// TestAlteredToken alters the good token at each of its bytes.
func TestAlteredToken(t *testing.T) {
	keys, token := newTokens(rfcKey()), goodToken()
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
	keys := newTokens(rfcKey())
	longest := must(keys.sign(c))
	if len(longest) != 8<<10 {
		t.Errorf("got %d bytes, want 8 KiB", len(longest))
	}
	checkValid(t, keys, longest, c)
	c.Name += "Z"
	checkInvalid(t, "more than 8 KiB", keys, must(keys.sign(c)))

	for _, token := range []string{
		strip(rfcToken), // its header alone is enough to reject it
		strings.Repeat(".", 900<<10),
		tokenHeader + strings.Repeat(".", 900<<10),
		tokenHeader + "e30." + strings.Repeat("A", 900<<10),
		tokenHeader + strings.Repeat("A", 900<<10) + goodToken()[len(tokenHeader):],
	} {
		checkInvalid(t, token[:60], keys, token)
		if got := testing.AllocsPerRun(5, func() { keys.verify(token) }); got != 0 {
			t.Errorf("%.60s…: got %v allocations, want 0", token, got)
		}
	}
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, c := newTokens(rfcKey()), claims{Expires: time.Now().Unix() + 600, UserID: jackID}
		token := must(keys.sign(c))
		for _, wait := range []time.Duration{0, 10*time.Minute - time.Nanosecond} {
			time.Sleep(wait)
			checkValid(t, keys, token, c)
			checkValid(t, newTokens(rfcKey()), token, c)
		}
		for _, wait := range []time.Duration{time.Nanosecond, 24 * time.Hour} {
			time.Sleep(wait)
			checkInvalid(t, "remembered, after "+wait.String(), keys, token)
			checkInvalid(t, "new, after "+wait.String(), newTokens(rfcKey()), token)
		}
	})
}

func TestRememberedTokens(t *testing.T) {
	keys, most := newTokens(rfcKey()), 0
	for i := range 25_000 {
		keys.remember(strconv.Itoa(i), goodClaims)
		most = max(most, len(keys.verified))
	}
	if most != 10_000 {
		t.Errorf("most remembered tokens: got %d, want 10000", most)
	}
	checkValid(t, keys, goodToken(), goodClaims)
	keys.key = new(rsa.PrivateKey) // cannot verify a signature
	checkValid(t, keys, goodToken(), goodClaims)
	clear(keys.verified)
	checkInvalid(t, "not remembered", keys, goodToken())
}

func TestTokensConcurrently(t *testing.T) {
	keys, token := newTokens(rfcKey()), goodToken()
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 20 {
				c := claims{Expires: 4102444800, UserID: fmt.Sprintf("7%04d%04d", worker, i)}
				checkValid(t, keys, must(keys.sign(c)), c)
				checkValid(t, keys, token, goodClaims)
			}
		})
	}
	wg.Wait()
}

// TestPublicKey verifies a token as another service does, with the published key.
func TestPublicKey(t *testing.T) {
	got := newTokens(rfcKey()).jwk()
	n, e := got["n"], got["e"]
	if !strings.HasPrefix(strip(rfcJWK), `{"kty":"RSA","n":"`+n+`","e":"`+e+`","d":`) {
		t.Errorf("got n %s, e %s, want %s", n, e, rfcJWK)
	}
	want := map[string]string{"kty": "RSA", "use": "sig", "alg": "RS256", "n": n, "e": e}
	if !maps.Equal(got, want) { // so there is no d, p or q
		t.Errorf("got %v, want %v", got, want)
	}
	key := rsa.PublicKey{N: bigInt(n), E: int(bigInt(e).Int64())}
	checkValid(t, newTokens(&rsa.PrivateKey{PublicKey: key}), goodToken(), goodClaims)
}

func TestReadKey(t *testing.T) {
	pkcs8 := func(key any) []byte { return pemText("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(key))) }
	key, small := otherKey(), must(rsa.GenerateKey(rand.Reader, 1024))
	pkcs1 := x509.MarshalPKCS1PrivateKey(key)
	ec := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	certificate := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	damaged := bytes.Clone(pkcs1)
	damaged[100] ^= 1 // in the modulus
	locked := &pem.Block{Type: "RSA PRIVATE KEY", Bytes: []byte(rand.Text()), Headers: map[string]string{
		"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-128-CBC,E3E18897A2529EA356EF66FEAB59FA39",
	}}

	for want, files := range map[string][][]byte{
		"": {
			pkcs8(key), pemText("RSA PRIVATE KEY", pkcs1),
			bytes.ReplaceAll(pkcs8(key), []byte("\n"), []byte("\r\n")),
			append([]byte("Idea Pool\n"), pkcs8(key)...),
		},
		"only 1024 bits; choose":                       {pkcs8(small), pemText("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(small))},
		"only 2047 bits; choose a key of 2048 or more": {pkcs8(must(rsa.GenerateKey(rand.Reader, 2047)))},
		"not a PEM file":                               {nil, []byte("correct horse\n"), must(x509.MarshalPKCS8PrivateKey(key)), pkcs8(key)[:800]},
		"not an unencrypted RSA private key": {
			pemText("ENCRYPTED PRIVATE KEY", []byte(decode(strip(encryptedPKCS8)))), pem.EncodeToMemory(locked),
			pkcs8(ec), pemText("EC PRIVATE KEY", must(x509.MarshalECPrivateKey(ec))), pkcs8(ed),
			pemText("CERTIFICATE", certificate), pemText("RSA PRIVATE KEY", damaged),
			pemText("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(&key.PublicKey))),
			pemText("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&key.PublicKey)),
			pemText("PRIVATE KEY", []byte("correct horse")), pemText("RSA PRIVATE KEY", []byte("correct horse")),
		},
	} {
		for i, file := range files {
			path := filepath.Join(t.TempDir(), "key.pem")
			writeFile(t, path, file)
			before := filesIn(path)
			got, err := readKey(path)
			valid := err == nil && got.Equal(key)
			rejected := err != nil && got == nil && strings.Contains(err.Error(), want)
			if want == "" && !valid || want != "" && !rejected {
				t.Errorf("%d, %.40q: got key %v, error %v, want error %q", i, file, got != nil, err, want)
			}
			if after := filesIn(path); after != before {
				t.Errorf("%d, %.40q: got %s, want %s", i, file, after, before)
			}
		}
	}
	if _, err := readKey(filepath.Join(t.TempDir(), "key.pem")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: got %v, want %v", err, fs.ErrNotExist)
	}
}

func TestMakeKey(t *testing.T) {
	directory := t.TempDir()
	path := filepath.Join(directory, "key.pem")
	// A crash has left the first file, and somebody a link.
	writeFile(t, path+".1234567890.tmp", []byte("half a key"))
	if err := os.Symlink("key.pem.1234567890.tmp", path+".tmp"); err != nil {
		t.Log("this system has no links:", err)
	}
	before := filesIn(directory)
	t.Setenv("TMPDIR", path+".missing") // may be another file system, so makeKey must not use it
	key, made, err := makeKey(path)
	if err != nil || !made {
		t.Fatalf("got made %v, %v, want true, nil", made, err)
	}
	if key.N.BitLen() != 2048 || key.E != 65537 {
		t.Errorf("got %d bits, exponent %d, want 2048 bits, exponent 65537", key.N.BitLen(), key.E)
	}
	if got, err := readKey(path); err != nil || !got.Equal(key) {
		t.Errorf("readKey: got error %v, want the key that was made", err)
	}
	if text := must(os.ReadFile(path)); !bytes.HasPrefix(text, []byte("-----BEGIN PRIVATE KEY-----\n")) {
		t.Errorf("got %.30q, want PEM of PKCS #8", text)
	}
	mode := must(os.Stat(path)).Mode()
	if mode != 0o600 && runtime.GOOS != "windows" || !isPrivate(path) {
		t.Errorf("got mode %v, private %v, want -rw-------, true", mode, isPrivate(path))
	}
	// The key must be the only new file.
	after := filesIn(directory)
	if got := strings.Replace(after, filesIn(path), "", 1); got != before {
		t.Errorf("other files: got %s, want %s", got, before)
	}

	if again, made, err := makeKey(path); err != nil || made || !again.Equal(key) {
		t.Errorf("again: got made %v, %v, want false, nil, the same key", made, err)
	}
	if got := filesIn(directory); got != after {
		t.Errorf("again: got %s, want %s", got, after)
	}
	if key, _, err := makeKey(filepath.Join(directory, "missing", "key.pem")); !errors.Is(err, fs.ErrNotExist) || key != nil {
		t.Errorf("no directory: got key %v, error %v, want %v", key != nil, err, fs.ErrNotExist)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if isPrivate(path) && runtime.GOOS != "windows" {
		t.Error("isPrivate with mode 640: got true, want false")
	}
}

// TestMakeKeyConcurrently makes a key at one path in 20 goroutines and two
// processes, which run this test, too.
func TestMakeKeyConcurrently(t *testing.T) {
	if path := os.Getenv(keyEnv); path != "" {
		fmt.Println(makeKeyResult(path))
		return
	}
	path := filepath.Join(t.TempDir(), "key.pem")
	results := make([]string, 22)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() { results[i] = makeKeyResult(path) })
	}
	for i := range 2 {
		wg.Go(func() {
			out, _ := makeKeyCommand(path).Output()
			results[20+i], _, _ = strings.Cut(string(out), "\n")
		})
	}
	wg.Wait()
	key := must(readKey(path)).N
	want := slices.Repeat([]string{fmt.Sprintf("made=false err=<nil> %x", key)}, 21)
	want = append(want, fmt.Sprintf("made=true err=<nil> %x", key))
	slices.Sort(results)
	if !slices.Equal(results, want) {
		t.Errorf("got %q, want %q", results, want)
	}
	if files := must(os.ReadDir(filepath.Dir(path))); len(files) != 1 && runtime.GOOS != "windows" { // it keeps names of open files
		t.Errorf("files: got %v, want only the key", files)
	}
}

// makeKeyResult returns all that makeKey returns, as text.
func makeKeyResult(path string) string {
	key, made, err := makeKey(path)
	if key == nil {
		key = new(rsa.PrivateKey)
	}
	return fmt.Sprintf("made=%v err=%v %x", made, err, key.N)
}

const keyEnv = "IDEAPOOL_TEST_KEY"

// makeKeyCommand returns a command that calls makeKey, run by before, if given.
func makeKeyCommand(path string, before ...string) *exec.Cmd {
	args := append(before, os.Args[0], "-test.run=^TestMakeKeyConcurrently$")
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), keyEnv+"="+path)
	return cmd
}

// TestNoKey has paths at which there is no key and none can be made. Whatever is
// there must stay as it is.
func TestNoKey(t *testing.T) {
	for name, create := range map[string]func(path string) error{
		"a directory":       func(path string) error { return os.Mkdir(path, 0o755) },
		"a FIFO":            func(path string) error { return exec.Command("mkfifo", path).Run() },
		"a device":          func(path string) error { return symlink(os.DevNull, path) },
		"garbage":           func(path string) error { return os.WriteFile(path, []byte("garbage"), 0o644) },
		"a link to garbage": func(path string) error { return symlink("garbage", path) },
		"a dangling link":   func(path string) error { return symlink("missing", path) },
	} {
		t.Run(name, func(t *testing.T) {
			directory := t.TempDir()
			path := filepath.Join(directory, "key.pem")
			writeFile(t, filepath.Join(directory, "garbage"), []byte("garbage"))
			if err := create(path); err != nil {
				t.Skip("this system has no such file:", err)
			}
			before := filesIn(directory)
			blocked := time.AfterFunc(time.Minute, func() { panic("got no result in a minute, want an error at once") })
			defer blocked.Stop()
			if key, err := readKey(path); err == nil || key != nil {
				t.Errorf("readKey: got key %v, error %v, want an error", key != nil, err)
			}
			if key, made, err := makeKey(path); err == nil || key != nil || made {
				t.Errorf("makeKey: got key %v, made %v, error %v, want an error", key != nil, made, err)
			}
			if after := filesIn(directory); after != before {
				t.Errorf("files: got %s, want %s", after, before)
			}
		})
	}

	t.Run("no room", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "key.pem")
		// No file may become larger than one block of 512 or 1024 bytes.
		out, err := makeKeyCommand(path, "sh", "-c", `ulimit -f 1 && exec "$0" "$@"`).Output()
		if err != nil {
			t.Skip("this system has no such limit:", err)
		}
		if !strings.HasPrefix(string(out), "made=false err=write ") {
			t.Errorf("got %s, want made=false and an error", out)
		}
		if files := must(os.ReadDir(filepath.Dir(path))); len(files) != 0 {
			t.Errorf("files: got %v, want none", files)
		}
	})
}

// filesIn returns the names, modes, times and contents of all files in a directory, or of one file.
func filesIn(root string) string {
	var s strings.Builder
	filepath.WalkDir(root, func(path string, file fs.DirEntry, err error) error {
		info := must(file.Info())
		fmt.Fprintln(&s, path, info.Mode())
		if info.Mode().IsRegular() {
			fmt.Fprintf(&s, "%v %q\n", info.ModTime(), must(os.ReadFile(path)))
		}
		return err
	})
	return s.String()
}

func writeFile(t *testing.T, path string, content []byte) {
	if err := os.WriteFile(path, content, 0o640); err != nil {
		t.Fatal(err)
	}
}

func FuzzVerify(f *testing.F) {
	keys, valid := newTokens(rfcKey()), goodToken()
	f.Add(valid)
	for _, token := range forgeries() {
		f.Add(token)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if token == valid {
			checkValid(t, keys, token, goodClaims)
		} else {
			checkInvalid(t, strconv.Quote(token), keys, token)
		}
	})
}

func BenchmarkToken(b *testing.B) {
	keys, token := newTokens(rfcKey()), goodToken()
	b.Run("verify", func(b *testing.B) {
		for b.Loop() {
			clear(keys.verified)
			must(keys.verify(token))
		}
	})
	b.Run("verify again", func(b *testing.B) {
		for b.Loop() {
			must(keys.verify(token))
		}
	})
	b.Run("sign", func(b *testing.B) {
		for b.Loop() {
			must(keys.sign(goodClaims))
		}
	})
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

// rfcKey is the key of RFC 7515 §A.2.1, the server's in these tests.
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
	"n":"ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpa
	SHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ",
	"e":"AQAB",
	"d":"Eq5xpGnNCivDflJsRQBXHx1hdR1k6Ulwe2JZD50LpXyWPEAeP88vLNO97IjlA7_GQ5sLKMgvfTeXZx9SE-7YwVol2NXOoAJe46sui395IW_GO-pWJ1O0BkTGoVEn2bKVRUCgu-GjBVaYLU6f3l9kJfFNS3E0QbVdxzubSu3Mkqzj
	kn439X0M_V51gfpRLI9JYanrC4D4qAdGcopV_0ZHHzQlBjudU2QvXt4ehNYTCBr6XCLQUShb1juUO1ZdiYoFaFQT5Tw8bGUl_x_jTj3ccPDVZFD9pIuhLhBOneufuBiB4cS98l2SR_RQyGWSeWjnczT0QU91p1DhOVRuOopznQ",
	"p":"4BzEEOtIpmVdVEZNCqS7baC4crd0pqnRH_5IB3jw3bcxGn6QLvnEtfdUdiYrqBdss1l58BQ3KhooKeQTa9AB0Hw_Py5PJdTJNPY8cQn7ouZ2KKDcmnPGBY5t7yLc1QlQ5xHdwW1VhvKn-nXqhJTBgIPgtldC-KDV5z-y2XDwGUc",
	"q":"uQPEfgmVtjL0Uyyx88GZFF1fOunH3-7cepKmtH4pxhtCoHqpWmT8YAmZxaewHgHAjLYsp1ZSe7zFYHj7C6ul7TjeLQeZD_YwD66t62wDmpe_HlB-TnBA-njbglfIsRLtXlnDzQkv5dTltRJ11BKBBypeeF6689rjcJIDEz9RWdc"}`

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

// A key with a passphrase, as openssl writes it (PKCS #8), in base64url.
const encryptedPKCS8 = `
	MIIBvTBXBgkqhkiG9w0BBQ0wSjApBgkqhkiG9w0BBQwwHAQIOjTGCYJ-40cCAggAMAwGCCqGSIb3DQIJBQAwHQYJYIZIAWUDBAEqBBDYuwGweUqvdwR9E9c5H_JkBIIBYGPJZDxEBkj76nM3a6lO5h8PkOGEcKoODX6uOAq2RtO6
	D95SVMsP1Qv6d2ngpYmhogCzlIfd3iB-JAwfM-MR2GM3zvJCa_8heYl6G3PtgOW84Q2NutOH7hAPi1LqxWNKSFHy2SUTwq4k9RBMyExU3RHN-2fVl12iJb3R_6WQdcc_Ub5RwXYw-V5-7sZEYMLLlMy-KC1yxuDxUOQ4mQVF26O_
	l8wWF7b0hbszNcWrkCFWIULlM6oCbbQ785X6et0QK0BrpotxcbYm0PfxyVSMNuHCKvuOPG2U3uUf9-_MbviEtVU9gwKbvvfZBkEDFAtlM5IiuMroDWsZ-x2pzqOP7jIjLyitZRykWTZplBEQoxYWWmWe_6uYuyvu9n76dOKLmz9r
	uJhMSZ5INUX0iau7y9YJVSYgasHH8JM1EdQdTQ16GeeUXXny6ua8GdomKve6AMc4U_dwRGpIr21i0bH0Jl4`
