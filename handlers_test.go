package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestCreateIdeaWithoutToken is a plain test to begin with: it makes a request
// and a recorder, calls the server, and compares what was recorded.
func TestCreateIdeaWithoutToken(t *testing.T) {
	s := newTestServer(t)
	r := httptest.NewRequest("POST", "/ideas", strings.NewReader(anIdea))
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	if w.Code != http.StatusUnauthorized {
		t.Errorf("got status %d, want %d", w.Code, http.StatusUnauthorized)
	}
	if got, want := w.Body.String(), `{"reason":"you can not pass!"}`; got != want {
		t.Errorf("got body %s, want %s", got, want)
	}
}

// TestAPI plays the transcripts in testdata/api. They are the API document as
// tests, and document.txt explains their format.
func TestAPI(t *testing.T) {
	for _, path := range glob(t, "testdata/api/*.txt") {
		t.Run(filepath.Base(path), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if _, err := play(t, path); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestExercise plays the transcripts of the README's exercises. An unsolved
// exercise must fail, and at the step that follows its mark; a solved one must
// pass. With -exercise 2, only the second is played, and must pass. With
// -exercise none, all must fail: CI uses it on the main branch.
func TestExercise(t *testing.T) {
	number := cmp.Or(strings.TrimPrefix(*exercise, "none"), "*")
	for _, path := range glob(t, "testdata/exercises/"+number+"-*.txt") {
		t.Run(filepath.Base(path), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				failed, err := play(t, path)
				switch {
				case err == nil && *exercise == "none":
					t.Errorf("%s passes, want it to fail at the marked step", path)
				case err != nil && *exercise == number:
					t.Error(err)
				case err != nil && !failed.marked:
					t.Errorf("it fails at a step that is not marked:\n%v", err)
				}
			})
		})
	}
}

// TestNothingIsForgotten fails if a change is not complete, and says what is missing.
func TestNothingIsForgotten(t *testing.T) {
	_, reference, _ := strings.Cut(readFile(t, "README.md"), "\n## API reference\n")
	reference, exercises, _ := strings.Cut(reference, "**Exercises.**")
	s, played := newTestServer(t), make(map[string]bool)
	for _, path := range glob(t, "testdata/api/*.txt") {
		for _, sent := range readTranscript(t, path) {
			if method, target, isRequest := strings.Cut(sent.request, " "); isRequest && strings.HasPrefix(sent.want[0], "< 2") {
				_, pattern := s.mux.Handler(httptest.NewRequest(method, target, nil))
				played[pattern] = true
			}
		}
	}
	for _, pattern := range s.patterns {
		if !played[pattern] {
			t.Errorf("%s: add a transcript in which it succeeds to testdata/api", pattern)
		}
		if !strings.Contains(reference, "\n| `"+pattern+"` |") {
			t.Errorf("%s: add it to the table of routes in README.md", pattern)
		}
	}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[idea]()) {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if !regexp.MustCompile(`(?m)^\| [\w, ]*\b` + name + `\b|also has[^.]*\b` + name + `\b`).MatchString(reference) {
			t.Errorf("%s: add it to README.md, to the table of fields or to \"An idea in a response also has\"", name)
		}
	}
	for _, path := range glob(t, "testdata/exercises/*.txt") {
		number, _, _ := strings.Cut(filepath.Base(path), "-")
		exercises = strings.Replace(exercises, "\n"+number+". ", "\n", 1)
		if !strings.Contains(readFile(t, path), mark) {
			t.Errorf("%s: add the line %q before the first request that fails", path, mark)
		}
	}
	// Exercise 5 changes no response, so that the transcripts in testdata/api check it.
	if left := regexp.MustCompile(`(?m)^\d+`).FindAllString(exercises, -1); !slices.Equal(left, []string{"5"}) {
		t.Errorf("got the exercises %q without testdata/exercises/N-NAME.txt, want only 5", left)
	}
}

// TestNewRoutes adds a route with a new method, and one with a literal next to a
// wildcard. They must show in the index, in Allow and in every preflight.
func TestNewRoutes(t *testing.T) {
	s := newTestServer(t)
	done := func(w http.ResponseWriter, _ *http.Request) error { return writeJSON(w, http.StatusOK, "done") }
	s.handle("LOCK /healthz", done)
	s.handle("GET /ideas/export", done)
	c := newClient(t, s)
	c.expect("GET /ideas/export", "", "200")
	for path, want := range map[string]string{"/healthz": "GET, HEAD, LOCK", "/ideas/export": "DELETE, GET, HEAD, PUT"} {
		if got := c.send("NOPE "+path, "").Header.Get("Allow"); got != want {
			t.Errorf("%s: got the methods %s, want %s", path, got, want)
		}
	}
	for _, path := range []string{"/healthz", "/ideas/export", "/ideas", "/nowhere", "/", "//ideas/"} {
		got := c.send("OPTIONS "+path, "").Header.Get("Access-Control-Allow-Methods")
		if want := "DELETE, GET, LOCK, POST, PUT"; got != want {
			t.Errorf("a preflight of %s: got the methods %s, want %s", path, got, want)
		}
	}
	// The index lists the routes of the API, and neither itself nor OPTIONS.
	index := c.send("GET /", "").body
	if want := `,"LOCK /healthz","GET /ideas/export"]}`; !strings.HasSuffix(index, want) ||
		strings.Contains(index, "GET /{$}") || strings.Contains(index, "OPTIONS") {
		t.Errorf("got the index %s, want …%s", index, want)
	}
}

// TestTour runs the README's tour in a shell. Each response must be the one shown
// there, except for ids, times and tokens.
func TestTour(t *testing.T) {
	for _, name := range []string{"sh", "curl", "sed"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(err)
		}
	}
	s := httptest.NewServer(newTestServer(t))
	defer s.Close()
	_, tour, _ := strings.Cut(readFile(t, "README.md"), "## A tour\n")
	_, tour, _ = strings.Cut(tour, "```sh\n")
	tour, _, _ = strings.Cut(tour, "```")
	script := `curl() { command curl -sS --noproxy '*' "$@" && echo; }` + "\n" +
		strings.ReplaceAll(tour, "localhost:8080", s.Listener.Addr().String())
	output, err := exec.Command("sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Errorf("%v: %s", err, output)
	}
	varying := regexp.MustCompile(`"(jwt|refresh_token|id)":"[^"]*"|"created_at":\d+`)
	response := regexp.MustCompile(`(?m)^(# )?[{[].*`)
	got := strings.Join(response.FindAllString(varying.ReplaceAllString(string(output), "…"), -1), "\n")
	want := strings.Join(response.FindAllString(varying.ReplaceAllString(tour, "…"), -1), "\n")
	if want = strings.ReplaceAll(want, "# ", ""); got != want || strings.Count(want, "\n") < 5 {
		t.Errorf("got the responses\n%s\nwant\n%s", got, want)
	}
}

// Tables, with one line for each kind of request:

const wrongLogin = "400 wrong e-mail or password"

// TestBodies has the bodies that testdata/api/bodies.txt cannot show.
func TestBodies(t *testing.T) {
	c := newClient(t, newTestServer(t))
	c.signUp()
	c.expect("POST /ideas", " \r\n\t"+anIdea+" \r\n\t", "201", withToken)
	c.expect("POST /ideas", " \r\n\t"+anIdea, "201", withToken, "Content-Type: application/x-www-form-urlencoded")
	for _, body := range []string{"\ufeff" + anIdea, anIdea + "\x00", "{\"content\":\"a\xff\"}"} {
		c.expect("POST /ideas", body, "400 the body must be one JSON object, or a form", withToken)
	}
}

func TestBodyLimit(t *testing.T) {
	s := newTestServer(t)
	c := newClient(t, s)
	c.signUp()
	atLimit := anIdea + strings.Repeat(" ", 64<<10-len(anIdea))
	c.expect("POST /ideas", atLimit, "201", withToken)
	c.expect("POST /ideas", atLimit+" ", "413 the body must be at most 64 KiB", withToken)
	c.expect("GET /me", atLimit+" ", "200", withToken) // it reads no body

	// A body in chunks has no Content-Length. It is rejected while it is read. Of a
	// DELETE, it may be empty.
	for _, test := range []struct{ method, path, body, want string }{
		{"POST", "/users", atLimit, "422"},
		{"POST", "/users", atLimit + " ", "413"},
		{"DELETE", "/access-tokens", "", `422 {"reason":"refresh_token must be given"`},
	} {
		r := httptest.NewRequest(test.method, test.path, io.MultiReader(strings.NewReader(test.body)))
		r.Header.Set("X-Access-Token", c.names["jwt"])
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if got := fmt.Sprint(w.Code, " ", w.Body); !strings.HasPrefix(got, test.want) {
			t.Errorf("%s %s, %d bytes in chunks: got %s, want %s", test.method, test.path, len(test.body), got, test.want)
		}
	}
}

// TestFields tests both sides of every rule for a field. The other fields of
// each request are valid.
func TestFields(t *testing.T) {
	const (
		badAddress  = "422 email must be an e-mail address"
		badPassword = "422 password must have at least 8 characters, including an upper-case letter, " +
			"a lower-case letter and a number"
		badScore     = "422 impact must be an integer from 1 to 10"
		badToken     = "400 the refresh token is unknown, expired or logged out"
		control      = "must not contain control characters or U+FFFD"
		tooLong      = "must be at most 255 characters long"
		alreadyTaken = "422 email is already registered" // all fields are valid
	)
	bodies := map[string]string{
		"POST /users":                 jacksSignUp,
		"POST /access-tokens":         jacksLogin,
		"POST /access-tokens/refresh": `{"refresh_token":"x"}`,
		"POST /ideas":                 anIdea,
	}
	repeat := strings.Repeat
	c := newClient(t, newTestServer(t))
	c.signUp()
	for _, test := range []struct {
		route, field, want, values string
	}{
		{"POST /users", "email", alreadyTaken, `["jack@test.com", "\t JACK@test.com\r\n"]`},
		{"POST /users", "email", "422 email must be at most 254 characters long", `["` + repeat("a", 251) + `@b.c"]`},
		{"POST /users", "email", "422 email must not be empty", `["", " \t\r\n"]`},
		{"POST /users", "email", "422 email must be text", `[null, 7, ["a@b.c"]]`},
		{"POST /users", "email", badAddress, `["plain", "@b.c", "a@", "a@b@b.c", "a b@b.c", "a@b..c", "a@te_st.com"]`},
		{"POST /users", "email", badAddress, `["a@b.c, a@b.d", "<a@b.c>", "A <a@b.c>", "a@b.c (a)", "a@[127.0.0.1]"]`},
		{"POST /users", "email", badAddress, `["\"a\"@b.c", "é@b.c", "a@tést.com", "jac\u212a@test.com", "jack@te\u017ft.com"]`},

		{"POST /users", "name", alreadyTaken, `["J", "` + repeat("é", 255) + `"]`},
		{"POST /users", "name", "422 name " + tooLong, `["` + repeat("é", 256) + `"]`},
		{"POST /users", "name", "422 name must not be empty", `[" ", "\u00a0"]`},
		{"POST /users", "name", "422 name " + control, `["J\u0000", "J\u007f", "\udc00J"]`},

		{"POST /users", "password", alreadyTaken, `["aB3aB3aB", "éÉ3éÉ3éÉ", "aB3 \t\r\n aB3"]`},
		{"POST /users", "password", "422 password must be at most 1024 bytes long", `["aB3` + repeat("x", 1022) + `"]`},
		{"POST /users", "password", badPassword, `["aB3aB3a", "éÉ3éÉ3é", "ab3ab3ab", "AB3AB3AB", "aBcaBcaB"]`},
		{"POST /users", "password", "422 password " + control, `["aB3aB3aB\ud800", "aB3aB3aB\ufffd", "aB3aB3aB\u001b"]`},

		{"POST /access-tokens", "email", wrongLogin, `["nobody", "nobody@test.com", "jac\u212a@test.com"]`},
		{"POST /access-tokens", "email", wrongLogin, `["` + repeat("a", 251) + `@b.c"]`},
		{"POST /access-tokens", "password", wrongLogin, `["short", " the-Secret-123", "the-Secret-123 "]`},
		{"POST /access-tokens", "email", "422 email must not be empty", `[""]`},
		{"POST /access-tokens", "password", "422 password must not be empty", `[""]`},
		{"POST /access-tokens", "password", "422 password must be at most 1024 bytes long", `["` + repeat("x", 1025) + `"]`},
		{"POST /access-tokens", "password", "422 password " + control, `["the-Secret-123\ufffd"]`},
		{"POST /access-tokens/refresh", "refresh_token", badToken, `["x", "` + repeat("x", 60_000) + `"]`},
		{"POST /access-tokens/refresh", "refresh_token", "422 refresh_token must be text", `[null, 7]`},

		{"POST /ideas", "content", "201", `[" \u0061\r\n\tb ", "` + repeat("😀", 255) + `"]`},
		{"POST /ideas", "content", "201", `["  ` + repeat("a", 255) + `  "]`},
		{"POST /ideas", "content", "422 content " + tooLong, `["` + repeat("😀", 256) + `"]`},
		{"POST /ideas", "content", "422 content must not be empty", `[" \t\r\n\u00a0"]`},
		{"POST /ideas", "content", "422 content " + control, `["a\u000bb", "a\u007fb", "a\u0085b", "\udc00"]`},
		{"POST /ideas", "content", "422 content must be text", `[null, 7, {"a":1}]`},

		{"POST /ideas", "impact", "201", `[1, 10, "1", "10", "\u0038"]`},
		{"POST /ideas", "impact", badScore, `[0, 11, -1, -0, 8.5, 8.0, 1e1, 65537, 18446744073709551617]`},
		{"POST /ideas", "impact", badScore, `[true, null, [8], "", " 8", "+8", "8.0", "٨", "\\8"]`},
	} {
		var values []json.RawMessage
		if err := json.Unmarshal([]byte(test.values), &values); err != nil {
			t.Fatal(test.values, err)
		}
		for _, value := range values {
			var members map[string]json.RawMessage
			json.Unmarshal([]byte(bodies[test.route]), &members)
			members[test.field] = value
			body, _ := json.Marshal(members)
			c.expect(test.route, string(body), test.want, withToken)
		}
	}
}

// TestLongest signs up with the longest e-mail, name and password. The access token, which
// has two of them, works, and all bytes of the password count.
func TestLongest(t *testing.T) {
	c := newClient(t, newTestServer(t))
	email, name, password := strings.Repeat("&", 250)+"@b.c", strings.Repeat("<", 255), "aB3"+strings.Repeat("x", 1021)
	body := fmt.Sprintf(`{"email":%q,"name":%q,"password":%q}`, email, name, password)
	c.names["jwt"] = member(c.send("POST /users", body).body, "jwt")
	c.expect("GET /me", "", "200", withToken)
	c.expect("POST /access-tokens", body, "201")
	c.expect("POST /access-tokens", strings.Replace(body, `x"`, `y"`, 1), wrongLogin)
}

// TestAverages creates an idea for each sum of three scores. An average must be the
// shortest form of the double, with a decimal point. The list has the highest first.
func TestAverages(t *testing.T) {
	c := newClient(t, newTestServer(t))
	c.signUp()
	// Without a Content-Length, net/http would send a page of such ideas in chunks.
	content := strings.Repeat("long ", 25)
	var want, got []string
	for n := range 28 {
		sum := 30 - n*11%28 // from 30 to 3, out of order
		impact := min(sum-2, 10)
		ease := min(sum-impact-1, 10)
		body := fmt.Sprintf(`{"content":%q,"impact":%d,"ease":%d,"confidence":%d}`, content, impact, ease, sum-impact-ease)
		c.expect("POST /ideas", body, "201", withToken)
		average := strconv.FormatFloat(float64(30-n)/3, 'f', -1, 64)
		if (30-n)%3 == 0 {
			average += ".0"
		}
		want = append(want, `"average_score":`+average)
	}
	for page := range 3 {
		list := c.send(fmt.Sprint("GET /ideas?page=", page+1), "", withToken).body
		got = append(got, regexp.MustCompile(`"average_score":[^,]*`).FindAllString(list, -1)...)
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestPageNumbers(t *testing.T) {
	c := newClient(t, newTestServer(t))
	c.signUp()
	for query := range strings.FieldsSeq(
		"? ?page=1 ?page=03 ?page=1&x=%zz ?x=1&x=2;y ?q=100% ?Page=0 ?page=9223372036854775807 ?page=1&page=0 ?page=%zz") {
		c.expect("GET /ideas"+query, "", "200", withToken)
	}
	for page := range strings.FieldsSeq("0 -1 1.0 one %201 %2B1 1e1 0x1 9223372036854775808 18446744073709551616 &x=1 0&page=1") {
		c.expect("GET /ideas?page="+page, "", "422 page must be a positive integer", withToken)
	}
}

// TestFullDisk makes changes while the disk is full. They must have no effect.
func TestFullDisk(t *testing.T) {
	var full atomic.Bool
	s := newTestServer(t)
	s.store = startStore(t, filepath.Join(t.TempDir(), "ideas.json"), func(op, _ string, do func() error) error {
		if op == "write" && full.Load() {
			return syscall.ENOSPC
		}
		return do()
	})
	c := newClient(t, s)
	c.signUp()
	const notSaved = "503 cannot save changes right now; please try again"
	full.Store(true)
	for _, test := range []struct{ request, body, want string }{
		{"POST /ideas", anIdea, notSaved},
		{"POST /users", strings.Replace(jacksSignUp, "jack", "jill", 1), notSaved},
		{"POST /access-tokens", jacksLogin, notSaved},
		{"DELETE /access-tokens", `{"refresh_token":"$refresh"}`, notSaved},
		{"GET /me", "", "200"}, // the logout has ended nothing
		{"POST /access-tokens/refresh", `{"refresh_token":"$refresh"}`, "200"},
		{"GET /healthz", "", notSaved},
		{"POST /users", jacksSignUp, "422 email is already registered"}, // it does not get as far as the disk
		{"DELETE /ideas/000000000", "", "404 you have no such idea"},
	} {
		c.expect(test.request, test.body, test.want, withToken)
	}
	if list := c.send("GET /ideas", "", withToken).body; list != "[]" {
		t.Errorf("got the list %s, want []", list)
	}
	full.Store(false)
	c.expect("GET /healthz", "", "200") // it finds out by itself
	c.expect("POST /ideas", anIdea, "201", withToken)
}

// Logins under attack and under load:

// TestWaits tests how the wait grows: from 30 seconds to 15 minutes.
func TestWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClient(t, newTestServer(t))
		for range 9 {
			c.expect("POST /access-tokens", jacksLogin, wrongLogin)
		}
		for _, want := range append(strings.Fields("30 60 120 240 480"), slices.Repeat([]string{"900"}, 60)...) {
			c.expect("POST /access-tokens", jacksLogin, wrongLogin)
			if got := c.send("POST /access-tokens", jacksLogin).Header.Get("Retry-After"); got != want {
				t.Errorf("got the wait %q, want %s", got, want)
			}
			time.Sleep(15 * time.Minute)
		}
	})
}

// TestBurst makes 30 attempts at once. Apart from the first ten, only as many get
// through as hashes are computed at a time.
func TestBurst(t *testing.T) {
	for _, slots := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.hashing = make(semaphore, slots)
			c := newClient(t, s)
			for range slots { // so that all attempts wait for a slot first
				go occupy(s.hashing, time.Second)
			}
			synctest.Wait()
			var checked atomic.Int32
			atOnce(30, func(int) {
				if c.send("POST /access-tokens", jacksLogin).StatusCode == http.StatusBadRequest {
					checked.Add(1)
				}
			})
			if n := int(checked.Load()); n < 10 || n > 9+slots {
				t.Errorf("with %d slots, %d of 30 attempts were checked, want 10 to %d", slots, n, 9+slots)
			}
		})
	}
}

// occupy takes a slot for some time.
func occupy(s semaphore, d time.Duration) {
	s.acquire(context.Background())
	time.Sleep(d)
	s.release()
}

// TestClientAddr tests whose address counts, with and without a trusted proxy.
func TestClientAddr(t *testing.T) {
	const proxy, client = "192.0.2.1", "203.0.113.5"
	for _, test := range []struct {
		forwarded []string
		want      string
	}{
		{nil, proxy},
		{[]string{client}, client},
		{[]string{"198.51.100.7, " + client}, client}, // a client may have sent the first
		{[]string{"198.51.100.7", client}, client},    // HAProxy adds a line
		{[]string{client + ":1234"}, client},
		{[]string{"::ffff:" + client}, client},
		{[]string{"2001:db8::1"}, "2001:db8::1"},
		{[]string{"[2001:db8::1]"}, "2001:db8::1"},
		{[]string{"[2001:db8::1]:443"}, "2001:db8::1"},
		{[]string{client, ""}, proxy},
		{[]string{client + ","}, proxy},
		{[]string{"unknown"}, proxy},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = "[::ffff:" + proxy + "]:1234"
		r.Header["X-Forwarded-For"] = test.forwarded
		if got := newTestServer(t, "-trust-proxy").clientAddr(r).String(); got != test.want {
			t.Errorf("%.50q: got %s, want %s", test.forwarded, got, test.want)
		}
		if got := newTestServer(t).clientAddr(r).String(); got != proxy {
			t.Errorf("%.50q, without -trust-proxy: got %s, want %s", test.forwarded, got, proxy)
		}
	}
}

// TestUnknownEmail makes sure that a login with an unknown e-mail costs a hash, as one
// with a wrong password does. The memory that it takes shows this.
func TestUnknownEmail(t *testing.T) {
	s := newTestServer(t)
	s.hashCost.memory = 4 << 10 // KiB, so that nothing else counts
	r := httptest.NewRequest("POST", "/access-tokens", nil)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := s.checkPassword(r, "nobody@test.com", "the-Secret-123"); err != errWrongLogin {
		t.Errorf("got the error %v, want %v", err, errWrongLogin)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got < 4<<20 {
		t.Errorf("the login takes %d bytes, want 4 MiB", got)
	}
}

// TestHashes tests the hashes of the real server (other tests have cheaper ones), and how
// many are computed at once: at most three, and one less than there are cores.
func TestHashes(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	for cores, want := range map[int]int{1: 1, 2: 1, 3: 2, 4: 3, 16: 3} {
		runtime.GOMAXPROCS(cores)
		s := newServer(options{}, rfcKey(t), nil, quiet)
		if got := cap(s.hashing); got != want {
			t.Errorf("with %d cores: got %d hashes at once, want %d", cores, got, want)
		}
		one, _ := s.hashPassword(t.Context(), "the-Secret-123")
		other, _ := s.hashPassword(t.Context(), "the-Secret-123")
		if !strings.HasPrefix(one, "$argon2id$v=19$m=19456,t=2,p=1$") || one == other {
			t.Errorf("got the hashes %s and %s, want m=19456,t=2,p=1 and different salts", one, other)
		}
	}
}

// TestOldHash checks a password against a hash that an earlier version has stored.
func TestOldHash(t *testing.T) {
	const old = "$argon2id$v=19$m=64,t=1,p=1$c29tZXNhbHRzb21lc2FsdA$Ja6lHSXT36kMVbp3HYUZn8tSp1d0y1dq5/3DSU+zH3A"
	if !matches("the-Secret-123", old) || matches("the-Secret-124", old) {
		t.Error("a user who signed up with an earlier version cannot log in, or with any password")
	}
}

// TestBusy has clients that wait for a hash for 5 seconds in vain.
func TestBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.hashing = make(semaphore, 1)
		c := newClient(t, s)
		c.signUp()
		go occupy(s.hashing, 11*time.Second)
		synctest.Wait()
		busy, start := "503 "+errBusy.Reason, time.Now()
		c.expect("POST /access-tokens", jacksLogin, busy)
		c.expect("POST /users", strings.Replace(jacksSignUp, "jack", "jill", 1), busy)
		if took := time.Since(start); took != 10*time.Second {
			t.Errorf("two requests waited for %v, want 5 s each", took)
		}
		c.expect("POST /access-tokens", jacksLogin, "201")
	})
}

// TestClientsThatHangUp has clients that do not wait for a hash. None is computed for
// them, nothing is written, and nothing has failed.
func TestClientsThatHangUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, log := newTestServer(t), new(syncBuffer)
		s.logger = newLogger(log, false)
		s.hashing = make(semaphore, 1)
		network, stop := startServing(t, s)
		go occupy(s.hashing, time.Second)
		synctest.Wait()
		for path, body := range map[string]string{"/access-tokens": jacksLogin, "/users": jacksSignUp} {
			conn := network.dial()
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
			time.Sleep(300 * time.Millisecond)
			conn.Close()
		}
		synctest.Wait()
		lines := regexp.MustCompile(`^(time=\S+ level=INFO msg=request method=POST path=/\S+ status=499 .*\n){2}$`)
		if !lines.MatchString(log.String()) {
			t.Errorf("got the log\n%s\nwant %s", log, lines)
		}
		time.Sleep(2 * time.Second)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		for range 20 { // although a slot is free
			if err := s.hashing.acquire(gone); err != errClientGone || len(s.hashing) > 0 {
				t.Fatalf("got the error %v and %d slots taken, want %v and none", err, len(s.hashing), errClientGone)
			}
		}
		w := httptest.NewRecorder()
		func() {
			defer func() { recover() }() // as net/http would
			s.ServeHTTP(w, httptest.NewRequestWithContext(gone, "POST", "/users", strings.NewReader(jacksSignUp)))
		}()
		if w.Body.Len() > 0 || len(s.hashing) > 0 {
			t.Errorf("got the response %s, and %d slots are taken, want none", w.Body, len(s.hashing))
		}
		if n := len(s.store.emails) + len(s.throttle.failures); n > 0 {
			t.Errorf("%d passwords were hashed for clients that had gone", n)
		}
		stop()
	})
}

// Connections, errors and the log:

// TestSlowClients sends half a header, and half a body. Such clients are disconnected, and
// told why if they have sent a whole header.
func TestSlowClients(t *testing.T) {
	for _, test := range []struct {
		sent, want string
		timeout    time.Duration
	}{
		{"GET /healthz HTTP/1.1\r\nHost: x\r\nX-", "^HTTP/1.1 400 ", 5 * time.Second},
		{"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
			"(?s)^HTTP/1.1 408 .*" + errLateBody.Reason, 10 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			network, stop := startServing(t, newTestServer(t))
			conn, start := network.dial(), time.Now()
			go io.WriteString(conn, test.sent)
			response, _ := io.ReadAll(conn) // until it is disconnected
			took := time.Since(start)
			if !regexp.MustCompile(test.want).Match(response) || took < test.timeout || took > test.timeout+time.Second {
				t.Errorf("%q: got %s after %v, want %s after %v", test.sent, response, took, test.want, test.timeout)
			}
			stop()
		})
	}
}

// notRead are requests whose body no handler reads, and what they get.
var notRead = []struct{ request, want string }{
	{"POST //ideas/", "401 you can not pass!"},
	{"POST /nowhere", "404 there is nothing at this path"},
	{"PATCH /me", "405 method not allowed"},
	{"POST /users", "413 the body must be at most 64 KiB"},
	{"OPTIONS /ideas", "204"},
	{"GET /healthz", "200"},
}

// TestExpectContinue sends requests without their body, which may come only after
// 100 Continue. What can be answered without the body is answered at once.
func TestExpectContinue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, stop := startServing(t, newTestServer(t))
		send := func(request string, size int, expect, want string) {
			conn := network.dial()
			exchange(t, conn, fmt.Sprintf("%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n", request, size, expect), want)
			conn.Close()
		}
		start := time.Now()
		for _, test := range notRead {
			send(test.request, 64<<10+1, "Expect: 100-continue\r\n", test.want)
			send(test.request, 64<<10+1, "", test.want)
		}
		send("POST /users", 64<<10, "Expect: 100-continue\r\n", "100")
		send("POST /ideas", 9, "Transfer-Encoding: chunked\r\n", "401 you can not pass!")
		if took := time.Since(start); took > 0 {
			t.Errorf("the responses came after %v, want at once", took)
		}
		stop()
	})
}

// TestHeaderLimit sends headers of almost 16 KiB, and of more.
func TestHeaderLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, stop := startServing(t, newTestServer(t))
		for size, want := range map[int]string{15 << 10: "401 you can not pass!", 17 << 10: "431"} {
			conn := network.dial()
			exchange(t, conn, "GET /me HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", size)+"\r\n\r\n", want)
			conn.Close()
		}
		stop()
	})
}

// TestUnreadBodies sends bodies over connections that close after the response, which
// must arrive although the body comes late. This needs a real network, whose kernel
// resets such connections.
func TestUnreadBodies(t *testing.T) {
	s := httptest.NewServer(newTestServer(t))
	defer s.Close()
	for _, version := range []string{"1.0", "1.1"} {
		for _, test := range notRead {
			conn, err := net.Dial("tcp", s.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			const headers = "\r\nHost: x\r\nConnection: close\r\nContent-Length: 100000\r\n\r\n"
			io.WriteString(conn, test.request+" HTTP/"+version+headers)
			for range 9 {
				runtime.Gosched()
				io.WriteString(conn, strings.Repeat("x", 10_000))
			}
			exchange(t, conn, strings.Repeat("x", 10_000), test.want)
			conn.Close()
		}
	}
}

// TestKeepAlive sends requests over one connection: after an error, what is left of
// the body must not count as a request. Proxies reuse a connection after two minutes.
// If the rest does not come or does not end, it is read for a second, or up to 1 MiB.
func TestKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, stop := startServing(t, newTestServer(t))
		conn := network.dial()
		const header = "POST /ideas HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
		for range 2 {
			rejected := strings.Replace(header, "2000000", "20000", 1) + strings.Repeat("x", 20_000)
			exchange(t, conn, rejected, "401 you can not pass!")
		}
		time.Sleep(3*time.Minute - time.Second)
		exchange(t, conn, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "200")
		start := time.Now()
		io.Copy(io.Discard, conn) // until it is closed
		if took := time.Since(start); took != 3*time.Minute {
			t.Errorf("the idle connection was closed after %v, want 3 minutes", took)
		}
		conn, start = network.dial(), time.Now()
		exchange(t, conn, header, "401 you can not pass!")
		io.Copy(io.Discard, conn)
		if took := time.Since(start); took != time.Second {
			t.Errorf("without a body, the connection was closed after %v, want a second", took)
		}
		conn = network.dial()
		exchange(t, conn, header, "401 you can not pass!")
		if n, _ := io.WriteString(conn, strings.Repeat("x", 2_000_000)); n < 1<<20 || n > 1<<20+64<<10 {
			t.Errorf("%d bytes were read, want about 1 MiB", n)
		}
		stop()
	})
}

// TestShutdown stops the server during a request, which gets 8 s to finish.
func TestShutdown(t *testing.T) {
	for _, takes := range []time.Duration{7 * time.Second, 20 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.handle("GET /slow", func(w http.ResponseWriter, r *http.Request) error {
				time.Sleep(takes)
				return writeJSON(w, http.StatusOK, "done")
			})
			network, stop := startServing(t, s)
			conn, start := network.dial(), time.Now()
			io.WriteString(conn, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
			synctest.Wait()
			go stop()
			response, _ := io.ReadAll(conn)
			took, want := time.Since(start), min(takes, 8*time.Second)
			if took != want || strings.HasSuffix(string(response), `"done"`) != (takes == want) {
				t.Errorf("a request of %v: it ended after %v with the response %q", takes, took, response)
			}
		})
	}
}

// TestFailingHandlers has handlers that fail. If they have begun to write a response,
// the client must notice that it is not whole. A 1xx status is not the response. The
// log has one line.
func TestFailingHandlers(t *testing.T) {
	failed := errors.New("a secret")
	const internal = "500 something went wrong on the server"
	writeHalf := func(w http.ResponseWriter) {
		io.WriteString(w, `[{"half":`)
		http.NewResponseController(w).Flush()
	}
	for _, test := range []struct {
		want   string // the response; none if the connection is aborted
		log    string
		handle func(w http.ResponseWriter) error
	}{
		{internal, `500 .* error="a secret"`, func(http.ResponseWriter) error { return failed }},
		{internal, `500 .* error="panic: a secret.*handlers_test.go.*"`, func(http.ResponseWriter) error { panic(failed) }},
		{internal, `500 .* error=.*unsupported.*`, func(w http.ResponseWriter) error { return writeJSON(w, 200, t.Run) }},
		{internal, `500 .* error="a secret"`, func(w http.ResponseWriter) error { w.WriteHeader(103); return failed }},
		{"", `200 .* error="a secret"`, func(w http.ResponseWriter) error { writeHalf(w); return failed }},
		{"", `200 .* error="panic: a secret.*"`, func(w http.ResponseWriter) error { writeHalf(w); panic(failed) }},
		{"", `204 .* error="a secret"`, func(w http.ResponseWriter) error { w.WriteHeader(204); return failed }},
		{"", `0 .* error=".*abort.*"`, func(http.ResponseWriter) error { panic(http.ErrAbortHandler) }},
	} {
		log := new(syncBuffer)
		s := newTestServer(t)
		s.logger = newLogger(log, true)
		s.handle("GET /test", func(w http.ResponseWriter, _ *http.Request) error { return test.handle(w) })
		resp, err := newClient(t, s).try("GET /test", "")
		if (err != nil) != (test.want == "") || err == nil && resp.summary() != test.want {
			t.Errorf("%s: got %s, %v, want %q", test.log, resp.summary(), err, test.want)
		}
		line := regexp.MustCompile(`^time=\S+ level=ERROR msg=request method=GET path=/test status=` + test.log + `\n$`)
		if !line.MatchString(log.String()) {
			t.Errorf("got the log\n%s\nwant\n%s", log, line)
		}
	}
}

// TestLog tests that there is one line for each request, that no input can forge
// one, and that there are no secrets.
func TestLog(t *testing.T) {
	log := new(syncBuffer)
	s := newTestServer(t, "-trust-proxy")
	s.logger = newLogger(log, false)
	s.handle("GET /busy", func(http.ResponseWriter, *http.Request) error { return errBusy })
	c := newClient(t, s)
	c.signUp()
	c.expect("DELETE //access-tokens/?refresh_token=$refresh", "", "204", withToken)
	c.expect("POST /access-tokens", strings.Replace(jacksLogin, "3", "4", 1), wrongLogin, "X-Forwarded-For: 2001:db8::1")
	c.expect("GET /a%0aevil=1%1b[31m?secret=the-Secret-123", "", "404 there is nothing at this path")
	s.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", `/"b"\?the-Secret-123`, nil))
	s.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "http://jack:the-Secret-123@x/c", nil))
	c.expect("GET /busy", "", "503 "+errBusy.Reason)
	id := regexp.QuoteMeta(c.send("GET /", "").Header.Get("X-Request-Id"))
	want := []string{
		`level=INFO msg=request method=POST path=/users status=201 duration=\S+ client=192.0.2.1 id=\S+`,
		`level=INFO msg=request method=DELETE path=/access-tokens status=204 duration=\S+ client=192.0.2.1 id=\S+`,
		`level=WARN msg=request method=POST path=/access-tokens status=400 .* client=2001:db8::1 id=\S+ error="wrong .*"`,
		`level=INFO msg=request method=GET path="/a%0aevil=1%1b\[31m" status=404 duration=\S+ client=192.0.2.1 id=\S+`,
		`level=INFO msg=request method=GET path=/%22b%22%5C status=404 duration=\S+ client=192.0.2.1 id=\S+`,
		`level=INFO msg=request method=GET path=/c status=404 duration=\S+ client=192.0.2.1 id=\S+`,
		`level=ERROR msg=request method=GET path=/busy status=503 .* error="too many people .*"`,
		`level=INFO msg=request method=GET path=/ status=200 duration=\S+ client=192.0.2.1 id=` + id,
	}
	all := regexp.MustCompile(`^(time=\S+ ` + strings.Join(want, `\n)(time=\S+ `) + `\n)$`)
	if !all.MatchString(log.String()) {
		t.Errorf("got the log\n%s\nwant\n%s", log, strings.Join(want, "\n"))
	}
	for _, secret := range []string{"the-Secret", c.names["jwt"], c.names["refresh"]} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log contains %q", secret)
		}
	}
}

// Fuzzing and benchmarks:

// FuzzRequest tests that no method, path, body or header leads to a 5xx, a
// redirect, or a response that breaks the common rules.
func FuzzRequest(f *testing.F) {
	s := newTestServer(f, "-access-ttl", "24h")
	for _, pattern := range s.patterns {
		method, path, _ := strings.Cut(strings.Replace(pattern, "{id}", "x", 1), " ")
		f.Add(method, path, "application/json", anIdea)
		f.Add(method, path+"?page=2", "application/x-www-form-urlencoded", "refresh_token=a%00&email=a%40b.c")
	}
	f.Add("CONNECT", "/ideas/../me", "", "[]")
	f.Add("GET", "http://example.org", "", "")
	c := newClient(f, s)
	c.signUp()
	jack, _ := s.store.userByEmail("jack@test.com")
	f.Fuzz(func(t *testing.T, method, path, contentType, body string) {
		u, err := url.ParseRequestURI(path)
		if err != nil || path == "*" || !regexp.MustCompile("^[A-Z]+$").MatchString(method) {
			t.Skip()
		}
		access, err := s.newAccessToken(jack) // a new one if the last was logged out
		if err != nil {
			t.Fatal(err)
		}
		for _, token := range []string{"", access} {
			header := http.Header{"Content-Type": {contentType}, "X-Access-Token": {token}}
			r := &http.Request{Method: method, URL: u, Body: io.NopCloser(strings.NewReader(body)), Header: header}
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			resp, err := readResponse(w.Result(), method, "*")
			if err != nil || resp.StatusCode >= 500 || resp.StatusCode/100 == 3 {
				t.Errorf("%s %s: got %s, %v", method, path, resp.Status, err)
			}
		}
	})
}

// BenchmarkHandlers compares our handlers with a bare one that writes the same
// headers and bytes. With -benchtime 10000x, POST does not make a very long list.
func BenchmarkHandlers(b *testing.B) {
	s := newTestServer(b)
	c := newClient(b, s)
	c.signUp()
	for range 200 {
		c.names["id"] = member(c.send("POST /ideas", anIdea, withToken).body, "id")
	}
	for _, request := range []string{"GET /me", "GET /ideas", "POST /ideas", "PUT /ideas/$id"} {
		resp := c.send(request, anIdea, withToken)
		bare := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			maps.Copy(w.Header(), resp.Header)
			w.WriteHeader(resp.StatusCode)
			io.WriteString(w, resp.body)
		})
		r := httptest.NewRequest(resp.Request.Method, resp.Request.URL.Path, nil)
		r.Header.Set("X-Access-Token", c.names["jwt"])
		for name, h := range map[string]http.Handler{"bare": bare, "ours": s} {
			b.Run(request+"/"+name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					r := *r
					r.Body = io.NopCloser(strings.NewReader(anIdea))
					h.ServeHTTP(httptest.NewRecorder(), &r)
				}
			})
		}
	}
}
