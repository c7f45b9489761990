package main

import (
	"bufio"
	"bytes"
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
	"os"
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

// Three tests fail when a change is not complete, and say what is missing.

func TestNoRouteIsForgotten(t *testing.T) {
	var steps []*step
	for _, path := range glob(t, "testdata/api/*.txt") {
		steps = append(steps, readTranscript(t, path)...)
	}
	s, played := newTestServer(t), make(map[string]bool)
	for _, sent := range steps {
		if sent.want != nil && strings.HasPrefix(sent.want[0], "< 2") {
			method, target, _ := strings.Cut(sent.request, " ")
			_, pattern := s.mux.Handler(httptest.NewRequest(method, target, nil))
			played[pattern] = true
		}
	}
	table := readmeSection(t, "API reference")
	for _, pattern := range s.patterns {
		if !played[pattern] {
			t.Errorf("%s: add a transcript in which it succeeds to testdata/api", pattern)
		}
		if !strings.Contains(table, "\n| `"+pattern+"` |") {
			t.Errorf("%s: add it to the table of routes in README.md", pattern)
		}
	}
}

func TestNoFieldIsForgotten(t *testing.T) {
	reference := readmeSection(t, "API reference")
	documented := regexp.MustCompile(`(?m)^\| [\w, ]+ \|`).FindAllString(reference, -1) // the table of fields
	documented = append(documented, regexp.MustCompile(`An idea in a response also has [^.]*`).FindString(reference))
	words := regexp.MustCompile(`\w+`).FindAllString(strings.Join(documented, " "), -1)
	for _, field := range reflect.VisibleFields(reflect.TypeFor[idea]()) {
		if name, _, _ := strings.Cut(field.Tag.Get("json"), ","); !slices.Contains(words, name) {
			t.Errorf("%s: add it to README.md, to the table of fields or to \"An idea in a response also has\"", name)
		}
	}
}

// TestNoExerciseIsForgotten compares the README's list with the transcripts. Exercise
// 5 has none: it changes no response, so that those in testdata/api check it.
func TestNoExerciseIsForgotten(t *testing.T) {
	_, list, _ := strings.Cut(readFile(t, "README.md"), "**Exercises.**")
	numbers := regexp.MustCompile(`(?m)^\d+`).FindAllString(list, -1)
	played := []string{"5"}
	for _, path := range glob(t, "testdata/exercises/*.txt") {
		number, _, _ := strings.Cut(filepath.Base(path), "-")
		played = append(played, number)
		if !slices.Contains(numbers, number) {
			t.Errorf("%s: add exercise %s to README.md", path, number)
		}
		if !strings.Contains(readFile(t, path), mark) {
			t.Errorf("%s: add the line %q before the first request that fails", path, mark)
		}
	}
	for _, number := range numbers {
		if !slices.Contains(played, number) {
			t.Errorf("exercise %s of README.md: add testdata/exercises/%s-NAME.txt", number, number)
		}
	}
}

// TestNewRoutes adds a route with a new method, and one with a literal next to a
// wildcard. Their methods must show in Allow and in every preflight.
func TestNewRoutes(t *testing.T) {
	s := newTestServer(t)
	done := func(w http.ResponseWriter, _ *http.Request) error { return writeJSON(w, http.StatusOK, "done") }
	s.handle("LOCK /me", done)
	s.handle("GET /ideas/export", done)
	c := newClient(t, s)
	c.expect("LOCK /me", "", "200")
	c.expect("GET /ideas/export", "", "200")
	for path, want := range map[string]string{"/me": "GET, HEAD, LOCK", "/ideas/export": "DELETE, GET, HEAD, PUT"} {
		if got := c.send("NOPE "+path, "").Header.Get("Allow"); got != want {
			t.Errorf("%s: got the methods %s, want %s", path, got, want)
		}
	}
	for _, path := range []string{"/me", "/ideas/export", "/ideas", "/nowhere", "/", "//ideas/"} {
		got := c.send("OPTIONS "+path, "").Header.Get("Access-Control-Allow-Methods")
		if want := "DELETE, GET, LOCK, POST, PUT"; got != want {
			t.Errorf("a preflight of %s: got the methods %s, want %s", path, got, want)
		}
	}
}

// TestTour plays the curl lines of the README's tour. Each response must be the
// one shown there, except for ids, times and tokens.
func TestTour(t *testing.T) {
	c := newClient(t, newTestServer(t))
	_, tour, _ := strings.Cut(readmeSection(t, "A tour"), "```sh\n")
	tour, _, _ = strings.Cut(tour, "```")
	varying := regexp.MustCompile(`"(jwt|refresh_token|id)":"[^"]*"|"created_at":\d+`)
	//                        NAME=$(   curl ARGUMENTS | sed …"MEMBER"…   # response
	re := regexp.MustCompile(`(?:(\w+)=\$\()?curl (.*?)(?: \| .*"(\w+)".*)?\n(?:# ([{[].*)\n)?`)
	lines := re.FindAllStringSubmatch(tour, -1)
	c.names["n"] = "1" // which a loop counts
	for _, line := range lines {
		name, arguments, wanted, want := line[1], line[2], line[3], line[4]
		got := c.curl(arguments)
		if name != "" {
			c.names[name] = member(got, wanted)
		} else if varying.ReplaceAllString(got, "…") != varying.ReplaceAllString(want, "…") && !strings.Contains(arguments, "done") {
			t.Errorf("curl %s\n got %s\nwant %s", arguments, got, want)
		}
	}
	if want := strings.Count(tour, "curl "); len(lines) != want || want < 10 {
		t.Errorf("played %d of %d lines", len(lines), want)
	}
}

// curl sends the request that curl would send, and returns the body of the response.
func (c *client) curl(arguments string) string {
	option := func(name string) (values []string) {
		for _, found := range regexp.MustCompile(name+` ('[^'$]*'|"[^"]*"|[^'"\s]+)`).FindAllStringSubmatch(arguments, -1) {
			values = append(values, strings.Trim(found[1], `'"`))
		}
		return values
	}
	method, body, headers := "GET", strings.Join(option("-d"), "&"), option("-H")
	if body != "" {
		method, headers = "POST", append(headers, "Content-Type: application/x-www-form-urlencoded")
	}
	method = append(option("-X"), method)[0] // if it is given
	target := regexp.MustCompile(`localhost:8080([^\s"]*)`).FindStringSubmatch(arguments)[1]
	return c.send(method+" "+target, body, headers...).body
}

// Tables, with one line for each kind of request:

const wrongLogin = "400 wrong e-mail or password"

// TestBodies has the bodies that testdata/api/bodies.txt cannot show.
func TestBodies(t *testing.T) {
	const notJSON = "400 the body must be one JSON object, or a form"
	c := newClient(t, newTestServer(t))
	c.signUp()
	for _, test := range []struct{ contentType, body, want string }{
		{"application/json", " \r\n\t" + anIdea + " \r\n\t", "201"},
		{"application/x-www-form-urlencoded", " \r\n\t" + anIdea, "201"},
		{"application/json", "\ufeff" + anIdea, notJSON},
		{"application/json", anIdea + "\x00", notJSON},
		{"application/json", "{\"content\":\"a\xff\"}", notJSON},
		{"application/json", strings.Repeat(`{"a":`, 10_000), notJSON},
	} {
		c.expect("POST /ideas", test.body, test.want, withToken, "Content-Type: "+test.contentType)
	}
}

func TestBodyLimit(t *testing.T) {
	s := newTestServer(t)
	c := newClient(t, s)
	c.signUp()
	atLimit := anIdea + strings.Repeat(" ", 64<<10-len(anIdea))
	const tooLarge = "413 the body must be at most 64 KiB"
	for request, want := range map[string]string{
		"POST /ideas":                 tooLarge,
		"PUT /ideas/x":                tooLarge,
		"POST /users":                 tooLarge,
		"POST /access-tokens":         tooLarge,
		"POST /access-tokens/refresh": tooLarge,
		"DELETE /access-tokens":       tooLarge,
		"GET /me":                     "200", // a route that reads no body
	} {
		c.expect(request, atLimit+" ", want, withToken)
	}
	c.expect("POST /ideas", atLimit, "201", withToken)
	// A body without a Content-Length is rejected while it is read.
	for body, want := range map[string]int{atLimit: 422, atLimit + " ": 413} {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest("POST", "/users", io.MultiReader(strings.NewReader(body))))
		if w.Code != want {
			t.Errorf("%d bytes in chunks: got status %d, want %d", len(body), w.Code, want)
		}
	}
}

// TestNoBody sends a DELETE without a body, and with an empty one in chunks.
func TestNoBody(t *testing.T) {
	s := newTestServer(t)
	c := newClient(t, s)
	c.signUp()
	for _, body := range []io.Reader{http.NoBody, io.MultiReader()} {
		r := httptest.NewRequest("DELETE", "/access-tokens", body)
		r.Header.Set("X-Access-Token", c.names["jwt"])
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if want := "refresh_token must be given"; w.Code != 422 || !strings.Contains(w.Body.String(), want) {
			t.Errorf("got %d %s, want 422 and %s", w.Code, w.Body, want)
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
		{"POST /users", "email", "201", `["` + repeat("a", 250) + `@b.c"]`},
		{"POST /users", "email", "422 email must be at most 254 characters long", `["` + repeat("a", 251) + `@b.c"]`},
		{"POST /users", "email", "422 email must not be empty", `["", " \t\r\n"]`},
		{"POST /users", "email", "422 email must be text", `[null, 7, ["a@b.c"]]`},
		{"POST /users", "email", badAddress, `["plain", "@b.c", "a@", "a@b@b.c", "a b@b.c", "a@b..c", "a@te_st.com"]`},
		{"POST /users", "email", badAddress, `["a@b.c, a@b.d", "<a@b.c>", "A <a@b.c>", "a@b.c (a)", "a@[127.0.0.1]"]`},
		{"POST /users", "email", badAddress, `["\"a\"@b.c", "\"a b\"@b.c"]`},
		{"POST /users", "email", badAddress, `["é@b.c", "a@tést.com", "jac\u212a@test.com", "jack@te\u017ft.com"]`},

		{"POST /users", "name", alreadyTaken, `[" J ", "` + repeat("é", 255) + `"]`},
		{"POST /users", "name", "422 name " + tooLong, `["` + repeat("é", 256) + `"]`},
		{"POST /users", "name", "422 name must not be empty", `[" ", "\u00a0"]`},
		{"POST /users", "name", "422 name " + control, `["J\u0000", "J\u007f", "\udc00J"]`},

		{"POST /users", "password", alreadyTaken, `["aB3aB3aB", "éÉ3éÉ3éÉ", "aB3` + repeat("x", 1021) + `", "aB3 \t\r\n aB3"]`},
		{"POST /users", "password", "422 password must be at most 1024 bytes long", `["aB3` + repeat("x", 1022) + `"]`},
		{"POST /users", "password", badPassword, `["aB3aB3a", "éÉ3éÉ3é", "ab3ab3ab", "AB3AB3AB", "aBcaBcaB"]`},
		{"POST /users", "password", "422 password " + control, `["aB3aB3aB\ud800", "aB3aB3aB\ufffd", "aB3aB3aB\u001b"]`},

		{"POST /access-tokens", "email", wrongLogin, `["nobody", "nobody@test.com", "jac\u212a@test.com"]`},
		{"POST /access-tokens", "email", wrongLogin, `["` + repeat("a", 251) + `@b.c"]`},
		{"POST /access-tokens", "password", wrongLogin, `["short", " the-Secret-123", "the-Secret-123 "]`},
		{"POST /access-tokens", "email", "422 email must not be empty", `[""]`},
		{"POST /access-tokens", "password", "422 password must not be empty", `[""]`},
		{"POST /access-tokens", "password", "422 password " + control, `["the-Secret-123\ufffd"]`},
		{"POST /access-tokens/refresh", "refresh_token", badToken, `["x", "` + repeat("x", 60_000) + `"]`},
		{"POST /access-tokens/refresh", "refresh_token", "422 refresh_token must be text", `[null, 7]`},

		{"POST /ideas", "content", "201", `[" \u0061\r\n\tb ", "` + repeat("😀", 255) + `", "  ` + repeat("a", 255) + `  "]`},
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

// TestAverages creates two ideas for each sum of three scores. An average must be
// the shortest form of the double, with a decimal point. The pages must be in the
// order of the averages, and those with the same average have the newest first.
func TestAverages(t *testing.T) {
	c := newClient(t, newTestServer(t))
	c.signUp()
	// Without a Content-Length, net/http would send a page of such ideas in chunks.
	content := strings.Repeat("long ", 25)
	ideas := make(map[int]string) // by sum, as in a list
	for n := range 2 * 28 {
		sum := 3 + n*11%28 // from 3 to 30, out of order
		impact := min(sum-2, 10)
		ease := min(sum-impact-1, 10)
		body := fmt.Sprintf(`{"content":%q,"impact":%d,"ease":%d,"confidence":%d}`, content, impact, ease, sum-impact-ease)
		got := c.send("POST /ideas", body, withToken).body
		ideas[sum] = got + "," + ideas[sum]

		decimal := strconv.FormatFloat(float64(sum)/3, 'f', -1, 64)
		if sum%3 == 0 {
			decimal += ".0"
		}
		if !strings.Contains(got, `"average_score":`+decimal+`,`) {
			t.Errorf("want the average %s, got %s", decimal, got)
		}
	}
	var got, want string
	for sum := 30; sum >= 3; sum-- {
		want += ideas[sum]
	}
	for page := range (2*len(ideas) + pageSize - 1) / pageSize {
		list := c.send(fmt.Sprint("GET /ideas?page=", page+1), "", withToken).body
		got += strings.Trim(list, "[]") + ","
	}
	if got != want {
		t.Errorf("got the pages\n%s\nwant\n%s", got, want)
	}
}

func TestPageNumbers(t *testing.T) {
	c := newClient(t, newTestServer(t))
	c.signUp()
	for query := range strings.FieldsSeq("? ?page=1 ?page=03 ?page=1&x=%zz ?x=1&x=2;y ?q=100% ?Page=0 ?page=9223372036854775807 " +
		"?page=1&page=0 ?page=%zz ?page=0;") {
		c.expect("GET /ideas"+query, "", "200", withToken)
	}
	for page := range strings.FieldsSeq("0 -1 1.0 one %201 %2B1 1e1 0x1 18446744073709551616 9223372036854775808 " +
		"&x=1 0&page=1") {
		c.expect("GET /ideas?page="+page, "", "422 page must be a positive integer", withToken)
	}
}

// TestOrigins tests that -cors-origin takes what browsers send, and nothing else.
func TestOrigins(t *testing.T) {
	check := func(accepted bool, origins ...string) {
		for _, origin := range origins {
			_, err := parseFlags([]string{"-cors-origin", origin}, io.Discard)
			if (err == nil) != accepted || err != nil && !errors.Is(err, errUsage) {
				t.Errorf("%q: got the error %v, want it accepted: %t", origin, err, accepted)
			}
		}
	}
	check(true, strings.Fields(`
		* none https://a.example https://a.example:8443 https://a.example:80 http://a.example:443
		http://localhost:3000 http://localhost:65535 http://a:1 capacitor://localhost tauri://localhost
		chrome-extension://abcdef http://192.168.0.1 http://[::1]:8080 http://[2001:db8::1]
		https://xn--bcher-kva.example http://a_b.example https://1a.example`)...)
	check(false, strings.Fields(`
		null None ** a.example //a.example https:a.example https:// https://a.example/ https://a.example/b
		https://a.example?b https://a.example# https://a.example,https://b.example https://*.example https://*
		https://A.example HTTPS://a.example https://bücher.example https://user@a.example https://a.example:
		https://a.example:443 http://a:80 http://a:0 http://a:08080 http://a:-1 http://a:b
		http://[::1 http://[::1%eth0] http://[::FFFF] http://::1 file:// file://localhost file:///index.html`)...)
	check(false, "", " https://a.example", "https://a.example\n")
}

// TestFullDisk makes changes while the disk is full. They must have no effect.
func TestFullDisk(t *testing.T) {
	var full atomic.Bool
	var writes atomic.Int32
	s := newTestServer(t)
	s.store = startStore(t, filepath.Join(t.TempDir(), "ideas.json"), func(op, _ string, do func() error) error {
		if op == "write" && full.Load() {
			return syscall.ENOSPC
		}
		if op == "write" {
			writes.Add(1)
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
		{"POST /users", jacksSignUp, "422 email is already registered"}, // such changes do not get as far as the disk
		{"PUT /ideas/000000000", anIdea, "404 you have no such idea"},
		{"DELETE /ideas/000000000", "", "404 you have no such idea"},
	} {
		c.expect(test.request, test.body, test.want, withToken)
	}
	if list := c.send("GET /ideas", "", withToken).body; list != "[]" {
		t.Errorf("got the list %s, want []", list)
	}
	full.Store(false)
	c.expect("GET /healthz", "", "200") // it finds out by itself
	before := writes.Load()
	c.expect("GET /healthz", "", "200")
	if writes.Load() != before {
		t.Error("GET /healthz of a healthy server writes to the disk")
	}
	c.expect("POST /ideas", anIdea, "201", withToken)
}

// Logins under attack and under load:

// TestConcurrentAttempts makes 30 attempts at once, again and again. Apart from the
// first ten, only as many get through at a time as hashes are computed at a time. With
// the right password, clients do not throttle each other.
func TestConcurrentAttempts(t *testing.T) {
	for _, slots := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.hashing = make(semaphore, slots)
			c := newClient(t, s)
			least := 10
			for _, wait := range []string{"30", "60", "120", "240", "480", "900", "900"} {
				for range slots { // so that all attempts wait for a slot first
					go occupy(s.hashing, time.Second)
				}
				synctest.Wait()
				var checked atomic.Int32
				atOnce(30, func(int) {
					resp := c.send("POST /access-tokens", `{"email":"a@b.c","password":"x"}`)
					if resp.StatusCode == http.StatusBadRequest {
						checked.Add(1)
					} else if got := resp.Header.Get("Retry-After"); got != wait && slots == 1 {
						t.Errorf("got %d with the wait %s, want 429 with %s", resp.StatusCode, got, wait)
					}
				})
				if n := int(checked.Load()); n < least || n > least-1+slots {
					t.Errorf("with %d slots, %d of 30 attempts were checked, want %d to %d", slots, n, least, least-1+slots)
				}
				least = 1
				time.Sleep(15 * time.Minute)
			}
			c.signUp()
			atOnce(30, func(int) { c.expect("POST /access-tokens", jacksLogin, "201") })
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
		{[]string{strings.Repeat("x", 5000)}, proxy},
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

func TestThrottleIsBounded(t *testing.T) {
	throttle := loginThrottle{failures: make(map[attempt]failures)}
	for n := range 100_001 {
		throttle.note(attempt{email: [32]byte{byte(n), byte(n >> 8), byte(n >> 16)}}, false)
	}
	if n := len(throttle.failures); n > 50_000 {
		t.Errorf("%d attempts are remembered, want at most 50,000", n)
	}
}

// TestUnknownEmail makes sure that an unknown e-mail gets the same response as a
// wrong password, and costs a hash, as the memory that it takes shows.
func TestUnknownEmail(t *testing.T) {
	s := newTestServer(t)
	s.hashCost.memory = 4 << 10 // KiB, so that nothing else counts
	c := newClient(t, s)
	c.signUp()
	logIn := func(email string) string {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		resp := c.send("POST /access-tokens", fmt.Sprintf(`{"email":%q,"password":"a wrong one"}`, email))
		runtime.ReadMemStats(&after)
		if hashes := float64(after.TotalAlloc-before.TotalAlloc) / (4 << 20); hashes < 1 || hashes > 1.5 {
			t.Errorf("%s: the login takes the memory of %.2f hashes, want that of one", email, hashes)
		}
		resp.Header.Del("Date")
		resp.Header.Del("X-Request-Id")
		return fmt.Sprint(resp.StatusCode, resp.Header, resp.body)
	}
	known := logIn("jack@test.com")
	for _, email := range []string{"nobody@test.com", "nobody", "jac\u212a@test.com"} {
		if unknown := logIn(email); unknown != known {
			t.Errorf("a known e-mail gets\n%s\n%s\n%s", known, email, unknown)
		}
	}
}

// TestHashCost tests the hashes of the real server. Other tests have cheaper ones.
func TestHashCost(t *testing.T) {
	s := newServer(options{}, rfcKey(t), nil, quiet)
	one, err := s.hashPassword(t.Context(), "the-Secret-123")
	other, otherErr := s.hashPassword(t.Context(), "the-Secret-123")
	if err != nil || otherErr != nil || one == other {
		t.Errorf("got %s, %v and %s, %v, want hashes with different salts", one, err, other, otherErr)
	}
	for _, hash := range []string{one, dummyHash(s.hashCost)} {
		if !strings.HasPrefix(hash, "$argon2id$v=19$m=19456,t=2,p=1$") {
			t.Errorf("got the hash %s, want m=19456,t=2,p=1", hash)
		}
	}
}

// TestSemaphore tests the limit of concurrent hashes: at most three, and one less
// than there are cores. Others wait for at most 5 seconds.
func TestSemaphore(t *testing.T) {
	for cores, want := range map[int]int{1: 1, 2: 1, 3: 2, 4: 3, 16: 3} {
		before := runtime.GOMAXPROCS(cores)
		if got := cap(newTestServer(t).hashing); got != want {
			t.Errorf("with %d cores: got %d hashes at a time, want %d", cores, got, want)
		}
		runtime.GOMAXPROCS(before)
	}
	synctest.Test(t, func(t *testing.T) {
		hashing, start := make(semaphore, 2), time.Now()
		for range 2 {
			go occupy(hashing, 3*time.Second)
		}
		synctest.Wait()
		got := make([]string, 4)
		atOnce(4, func(n int) {
			err := hashing.acquire(t.Context())
			got[n] = fmt.Sprint(time.Since(start), err)
			if err == nil {
				time.Sleep(3 * time.Second)
				hashing.release()
			}
		})
		slices.Sort(got)
		busy := "5s " + errBusy.Reason
		if want := []string{"3s <nil>", "3s <nil>", busy, busy}; !slices.Equal(got, want) {
			t.Errorf("got (when, error) %q, want %q", got, want)
		}
	})
}

// TestLoginStorm logs in 40 times while a hash takes longer than anybody waits.
func TestLoginStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.hashing = make(semaphore, 1)
		c := newClient(t, s)
		c.signUp()
		go occupy(s.hashing, 11*time.Second)
		synctest.Wait()
		busy := "503 " + errBusy.Reason
		atOnce(40, func(n int) {
			c.expect("POST /access-tokens", jacksLogin, busy)
			c.expect("POST /users", strings.Replace(jacksSignUp, "jack", fmt.Sprint("a", n), 1), busy)
		})
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
		for n := range 40 {
			conn := network.dial()
			go func() {
				path, body := "/access-tokens", strings.Replace(jacksLogin, "jack", fmt.Sprint("a", n), 1)
				if n%2 == 0 {
					path, body = "/users", strings.Replace(jacksSignUp, "jack", fmt.Sprint("a", n), 1)
				}
				fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
				time.Sleep(300 * time.Millisecond)
				conn.Close()
			}()
		}
		time.Sleep(2 * time.Second)
		if got := strings.Count(log.String(), "level=INFO msg=request method=POST path=/"); got != 40 {
			t.Errorf("got %d lines of level INFO, want 40:\n%s", got, log)
		}
		if got := strings.Count(log.String(), "status=499"); got != 40 {
			t.Errorf("got %d lines with status 499, want 40:\n%s", got, log)
		}
		if n := len(s.store.emails) + len(s.throttle.failures); n > 0 {
			t.Errorf("%d passwords were hashed for clients that had gone", n)
		}
		stop()
	})
}

// Connections, panics and the log:

// TestSlowClients sends a byte now and then. Such clients are told so if they have
// sent a whole header, are disconnected, and block nobody. In the synctest bubble, the
// network is a pipe.
func TestSlowClients(t *testing.T) {
	for _, test := range []struct {
		sent, want string
		timeout    time.Duration
	}{
		{"GET /healthz HTTP/1.1\r\nHost: x\r\nX-", "", 5 * time.Second},
		{"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{", errLateBody.Reason, 10 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			network, stop := startServing(t, newTestServer(t))
			start := time.Now()
			slow := network.dial()
			go func() {
				io.WriteString(slow, test.sent)
				for err := error(nil); err == nil; time.Sleep(time.Second) {
					_, err = io.WriteString(slow, "a")
				}
			}()
			quick := network.dial()
			go io.WriteString(quick, "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			if got, _ := io.ReadAll(quick); !bytes.HasPrefix(got, []byte("HTTP/1.1 200 OK")) || time.Since(start) > 0 {
				t.Errorf("another client got %s after %v, want 200 OK at once", got, time.Since(start))
			}
			got, _ := io.ReadAll(slow) // until it is disconnected
			if !strings.Contains(string(got), test.want) {
				t.Errorf("%q: got the response %s, want %s", test.sent, got, test.want)
			}
			if took := time.Since(start); took < test.timeout || took > test.timeout+2*time.Second {
				t.Errorf("%q: disconnected after %v, want %v", test.sent, took, test.timeout)
			}
			stop()
		})
	}
}

// TestUnreadBodies sends bodies that no handler reads, over connections that close
// after the response: the response must arrive although the body comes late. This
// needs a real network, whose kernel resets such connections.
func TestUnreadBodies(t *testing.T) {
	s := newTestServer(t)
	c := newClient(t, s)
	c.signUp()
	token := "X-Access-Token: " + c.names["jwt"] + "\r\n"
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- s.serve(ctx, listener) }()
	for _, test := range []struct {
		request, header string
		want            int
	}{
		{"POST /ideas", "", 401},
		{"POST /nowhere", "", 404},
		{"PATCH /me", "", 405},
		{"POST /users", "", 413},
		{"OPTIONS /ideas", "", 204},
		{"GET /me", token, 200},
		{"DELETE /ideas/ID", token, 204},
	} {
		for _, version := range []string{"1.0", "1.1"} {
			id := member(c.send("POST /ideas", anIdea, withToken).body, "id")
			header := fmt.Sprintf("%s HTTP/%s\r\nHost: x\r\nConnection: close\r\nContent-Length: 100000\r\n%s\r\n",
				strings.Replace(test.request, "ID", id, 1), version, test.header)
			conn, err := net.Dial("tcp", listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(conn, header)
			for range 10 {
				runtime.Gosched()
				io.WriteString(conn, strings.Repeat("x", 10_000))
			}
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatalf("%s HTTP/%s: %v", test.request, version, err)
			}
			if _, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != test.want {
				t.Errorf("%s HTTP/%s: got %s, %v, want %d", test.request, version, resp.Status, err, test.want)
			}
			conn.Close()
		}
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestKeepAlive sends requests over one connection: after an error, what is left of
// the body must not count as a request. Proxies reuse a connection after two minutes.
func TestKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, stop := startServing(t, newTestServer(t))
		conn := network.dial()
		responses := bufio.NewReader(conn)
		for _, want := range []int{401, 401, 200} {
			if want == 200 {
				time.Sleep(3*time.Minute - time.Second)
			}
			go func() {
				request := "POST /ideas HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n\r\n" + strings.Repeat("x", 20_000)
				if want == 200 {
					request = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
				}
				io.WriteString(conn, request)
			}()
			resp, err := http.ReadResponse(responses, nil)
			if err != nil {
				t.Fatal(err)
			}
			if io.Copy(io.Discard, resp.Body); resp.StatusCode != want {
				t.Errorf("got %s, want %d", resp.Status, want)
			}
		}
		conn.Close()

		// This body never comes, or not in time. The connection must not be used again.
		conn = network.dial()
		start := time.Now()
		go io.WriteString(conn, "POST /ideas HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 401 || time.Since(start) > 0 {
			t.Errorf("got %v, %v after %v, want 401 at once", resp, err, time.Since(start))
		}
		io.Copy(io.Discard, conn)
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("the connection was closed after %v, want a second", took)
		}
		stop()
	})
}

// TestExpectContinue sends a request without its body, which comes only after
// 100 Continue. What can be rejected without the body is rejected at once.
func TestExpectContinue(t *testing.T) {
	const expect = "Expect: 100-continue\r\n"
	for _, test := range []struct {
		request, header string
		want            int
	}{
		{"POST /users", expect + "Content-Length: 65536", http.StatusContinue},
		{"POST /ideas", expect + "Content-Length: 9", http.StatusUnauthorized},
		{"POST //ideas/", expect + "Content-Length: 9", http.StatusUnauthorized},
		{"POST /ideas", expect + "Transfer-Encoding: chunked", http.StatusUnauthorized},
		{"POST /nowhere", expect + "Content-Length: 9", http.StatusNotFound},
		{"PATCH /me", expect + "Content-Length: 9", http.StatusMethodNotAllowed},
		{"POST /users", expect + "Content-Length: 65537", http.StatusRequestEntityTooLarge},
		{"POST /users", "Content-Length: 65537", http.StatusRequestEntityTooLarge},
		{"OPTIONS /ideas", expect + "Content-Length: 9", http.StatusNoContent},
	} {
		synctest.Test(t, func(t *testing.T) {
			network, stop := startServing(t, newTestServer(t))
			conn, start := network.dial(), time.Now()
			go io.WriteString(conn, test.request+" HTTP/1.1\r\nHost: x\r\n"+test.header+"\r\n\r\n")
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); resp.StatusCode != test.want || took > 0 {
				t.Errorf("%s, %q: got status %d after %v, want %d at once",
					test.request, test.header, resp.StatusCode, took, test.want)
			}
			conn.Close()
			stop()
		})
	}
}

// TestShutdown stops the server during a request, which gets 8 s to finish.
func TestShutdown(t *testing.T) {
	for seconds, want := range map[time.Duration]time.Duration{7: 7 * time.Second, 20: 8 * time.Second} {
		takes := seconds * time.Second
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.handle("GET /slow", func(w http.ResponseWriter, r *http.Request) error {
				time.Sleep(takes)
				return writeJSON(w, http.StatusOK, "done")
			})
			network, stop := startServing(t, s)
			conn := network.dial()
			io.WriteString(conn, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
			synctest.Wait()

			start := time.Now()
			var response []byte
			go func() { response, _ = io.ReadAll(conn) }()
			stop()
			took := time.Since(start)
			synctest.Wait()
			responds := bytes.HasSuffix(response, []byte(`"done"`))
			if responds != (takes == want) || took < want || took > want+time.Second {
				t.Errorf("a request of %v: stopped after %v with the response %q", takes, took, response)
			}
		})
	}
}

// startServing runs the server on a pipe network. The returned stop ends it and waits.
func startServing(t *testing.T, s *server) (network pipes, stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	network = make(pipes)
	done := make(chan error)
	go func() { done <- s.serve(ctx, network) }()
	t.Cleanup(func() { time.Sleep(time.Minute) }) // until handlers and clients have noticed
	return network, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestFailingHandlers has handlers that fail before they write a response, with one
// line in the log. A 1xx status is not the response.
func TestFailingHandlers(t *testing.T) {
	failed := errors.New("a secret")
	for _, test := range []struct {
		log    string
		handle func(w http.ResponseWriter) error
	}{
		{`error="a secret"`, func(http.ResponseWriter) error { return failed }},
		{`error="panic: a secret.*handlers_test.go`, func(http.ResponseWriter) error { panic(failed) }},
		{"unsupported type", func(w http.ResponseWriter) error { return writeJSON(w, 200, make(chan int)) }},
		{`error="a secret"`, func(w http.ResponseWriter) error { w.WriteHeader(http.StatusEarlyHints); return failed }},
	} {
		log := new(syncBuffer)
		s := newTestServer(t)
		s.logger = newLogger(log, true)
		s.handle("GET /test", func(w http.ResponseWriter, _ *http.Request) error { return test.handle(w) })
		c := newClient(t, s)
		c.expect("GET /test", "", "500 something went wrong on the server")
		line := regexp.MustCompile(`^time=\S+ level=ERROR msg=request method=GET path=/test status=500 .*` + test.log + `.*\n$`)
		if !line.MatchString(log.String()) {
			t.Errorf("got the log\n%s\nwant\n%s", log, line)
		}
		c.expect("GET /healthz", "", "200")
	}
}

// TestAbortedResponses has handlers that fail after they have begun to write. The
// client must notice, and there is one line in the log.
func TestAbortedResponses(t *testing.T) {
	failed := errors.New("a secret")
	writeHalf := func(w http.ResponseWriter) {
		io.WriteString(w, `[{"half":`)
		http.NewResponseController(w).Flush()
	}
	for _, test := range []struct {
		log    string
		handle func(w http.ResponseWriter) error
	}{
		{`status=200 .*error="a secret"`, func(w http.ResponseWriter) error { writeHalf(w); return failed }},
		{`status=200 .*error="panic: a secret`, func(w http.ResponseWriter) error { writeHalf(w); panic(failed) }},
		{`status=204 .*error="a secret"`, func(w http.ResponseWriter) error { w.WriteHeader(204); return failed }},
		{`status=0 .*abort`, func(http.ResponseWriter) error { panic(http.ErrAbortHandler) }},
	} {
		log := new(syncBuffer)
		s := newTestServer(t)
		s.logger = newLogger(log, true)
		s.handle("GET /test", func(w http.ResponseWriter, _ *http.Request) error { return test.handle(w) })
		c := newClient(t, s)
		if resp, err := c.try("GET /test", ""); err == nil {
			t.Errorf("got %s %s, want an error", resp.Status, resp.body)
		}
		line := regexp.MustCompile(`^time=\S+ level=ERROR msg=request method=GET path=/test ` + test.log + `.*\n$`)
		if !line.MatchString(log.String()) {
			t.Errorf("got the log\n%s\nwant\n%s", log, line)
		}
	}
}

// TestLog tests that there is one line for each request, that no input can forge
// one, and that there are no secrets.
func TestLog(t *testing.T) {
	var log bytes.Buffer
	s := newTestServer(t)
	s.logger = newLogger(&log, false)
	c := newClient(t, s)
	c.signUp()
	c.expect("DELETE //access-tokens/?refresh_token=$refresh", "", "204", withToken)
	c.expect("POST /access-tokens", `{"email":"jack@test.com","password":"the-Secret-124"}`, wrongLogin)
	c.expect("GET /a%0aevil=1%1b[31m?secret=the-Secret-123", "", "404 there is nothing at this path")
	s.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", `/"b"\?the-Secret-123`, nil))
	s.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "http://jack:the-Secret-123@x/c", nil))
	want := []string{
		`level=INFO msg=request method=POST path=/users status=201 duration=\S+ client=192.0.2.1 id=\w+`,
		`level=INFO msg=request method=DELETE path=/access-tokens status=204 duration=\S+ client=192.0.2.1 id=\w+`,
		`level=WARN msg=request method=POST path=/access-tokens status=400 duration=\S+ client=192.0.2.1 id=\w+ error="wrong e-mail or password"`,
		`level=INFO msg=request method=GET path="/a%0aevil=1%1b\[31m" status=404 duration=\S+ client=192.0.2.1 id=\w+`,
		`level=INFO msg=request method=GET path=/%22b%22%5C status=404 duration=\S+ client=192.0.2.1 id=\w+`,
		`level=INFO msg=request method=GET path=/c status=404 duration=\S+ client=192.0.2.1 id=\w+`,
	}
	all := regexp.MustCompile(`^(time=\S+ ` + strings.Join(want, `\n)(time=\S+ `) + `\n)$`)
	if !all.MatchString(log.String()) {
		t.Errorf("got the log\n%s\nwant\n%s", log.String(), strings.Join(want, "\n"))
	}
	for _, secret := range []string{"the-Secret", c.names["jwt"], c.names["refresh"]} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log contains %q", secret)
		}
	}
	log.Reset()
	s.logger = newLogger(&log, true)
	c.expect("GET /healthz", "", "200")
	c.expect("GET /nowhere", "", "404 there is nothing at this path")
	c.expect("POST /access-tokens", `{"email":"jack@test.com","password":"the-Secret-124"}`, wrongLogin)
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "status=400") {
		t.Errorf("got the quiet log\n%s\nwant the failed login only", got)
	}
}

// The command:

// startCommand runs the command in this process. The returned stop ends it, and
// returns all that it has printed.
func startCommand(t *testing.T, flags ...string) (c *client, stop func() (output string)) {
	ctx, cancel := context.WithCancel(t.Context())
	r, stderr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer stderr.Close()
		if err := run(ctx, append(flags, "-addr", "localhost:0"), stderr); err != nil {
			t.Error(err)
		}
	}()
	lines, output := bufio.NewReader(r), ""
	stop = func() string {
		cancel()
		rest, _ := io.ReadAll(lines) // all of it has been read if stop is called twice
		output += string(rest)
		return output
	}
	t.Cleanup(func() { stop() })
	for {
		line, err := lines.ReadString('\n')
		output += line
		if url := regexp.MustCompile(`at (http:.*)`).FindStringSubmatch(line); url != nil {
			return &client{t, url[1], http.DefaultTransport, "*", make(map[string]string)}, stop
		} else if err != nil {
			t.Fatalf("it does not start:\n%s", output)
		}
	}
}

// TestCommand starts the command twice; the second time, FILE ends with half a line.
func TestCommand(t *testing.T) {
	const welcome = "Idea Pool is at (http://127.0.0.1:\\d+)\n  data: ideapool.json\n  key:  ideapool.pem\nTry it:\n" +
		"  curl http://127.0.0.1:\\d+/users -d email=me@example.org -d name=Me -d password=the-Secret-123\n"
	t.Chdir(t.TempDir())
	c, stop := startCommand(t)
	c.signUp()
	for range 3 {
		c.expect("POST /ideas", anIdea, "201", withToken)
	}
	before := c.send("GET /ideas", "", withToken).body
	if output := stop(); !regexp.MustCompile("^" + welcome + "(time=.* msg=request .*\n){5}$").MatchString(output) {
		t.Errorf("got the output\n%s\nwant\n%s and five lines of the log", output, welcome)
	}
	saved := filesIn(t, ".")
	for _, secret := range []string{"the-Secret", c.names["jwt"], c.names["refresh"]} {
		if strings.Contains(saved, secret) {
			t.Errorf("%s is in the files\n%s", secret, saved)
		}
	}
	writeFile(t, "ideapool.json", readFile(t, "ideapool.json")+"{")
	names := c.names
	c, stop = startCommand(t, "-quiet")
	c.names = names
	if after := c.send("GET /ideas", "", withToken).body; after != before || strings.Count(after, "created_at") != 3 {
		t.Errorf("after a restart, got the list\n%s\nwant\n%s", after, before)
	}
	c.expect("POST /access-tokens/refresh", `{"refresh_token":"$refresh"}`, "200")
	c.expect("POST /access-tokens", jacksLogin, "201")
	if output := stop(); !regexp.MustCompile("^time=.* level=WARN .* line=8\n" + welcome + "$").MatchString(output) {
		t.Errorf("with -quiet, got the output\n%s\nwant a warning about line 8 and\n%s", output, welcome)
	}
}

// TestCommandInMemory starts the command without a data file. It makes only a key.
// Headers are limited to 16 KiB.
func TestCommandInMemory(t *testing.T) {
	t.Chdir(t.TempDir())
	c, stop := startCommand(t, "-data", "")
	for size, want := range map[int]int{15 << 10: 401, 17 << 10: 431} {
		r := httptest.NewRequest("GET", c.url+"/me", nil)
		r.Header.Set("X", strings.Repeat("x", size))
		r.Close = true // as net/http may have read 4 KiB of a second request
		resp, err := c.transport.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != want {
			t.Errorf("a header of %d bytes: got status %d, want %d", size, resp.StatusCode, want)
		}
	}
	stop()
	if names := glob(t, "*"); !slices.Equal(names, []string{"ideapool.pem"}) {
		t.Errorf("got the files %v, want ideapool.pem", names)
	}
}

// TestBadStarts tests that an error at the start is one line that names the flag
// or the file, and that no file is changed or left behind.
func TestBadStarts(t *testing.T) {
	busy := httptest.NewServer(nil)
	defer busy.Close()
	busyAddr := busy.Listener.Addr().String()
	key, err := filepath.Abs(rfcKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	t.Chdir(directory)
	os.MkdirAll("blocked.tmp/x", 0o700) // so that blocked cannot be written
	os.WriteFile("garbage", []byte("garbage"), 0o600)
	if exec.Command("mkfifo", "fifo").Run() != nil { // there are none on Windows
		os.Mkdir("fifo", 0o700)
	}
	for link, target := range map[string]string{
		"link": "garbage", "here": ".", "null": os.DevNull, "dangling": "nothing", "held2": "held",
	} {
		if symlink(target, link) != nil {
			t.Skip("this system has no symbolic links")
		}
	}
	startStore(t, "held", noSync)
	for _, name := range []string{"garbage", "blocked", "ideas"} {
		writeFile(t, name+".lock", "") // which a start may make
	}
	before := filesIn(t, ".")
	stopped, stop := context.WithCancel(t.Context()) // if it starts, it stops at once
	stop()
	const (
		usage     = "invalid usage: "
		badOrigin = usage + `-cors-origin ".*" is not an origin as browsers send it; ` +
			`give '[*]', none, or one such as https://example.org`
		badTime  = usage + "-access-ttl and -refresh-ttl must be 1s or more"
		sameFile = usage + "-key is one of the files that -data uses; choose another name"
	)
	for _, test := range []struct{ args, want string }{
		{"-nope", usage + "flag provided but not defined: -nope"},
		{"serve", usage + `unexpected argument "serve"`},
		{"-access-ttl ten", usage + `invalid value "ten" for flag -access-ttl: parse error`},
		{"-access-ttl 999ms", badTime},
		{"-refresh-ttl -1h", badTime},
		{"-cors-origin example.org", badOrigin},
		{"-cors-origin=", badOrigin},
		{"-addr=", usage + `-addr "" must have a port, such as localhost:8080`},
		{"-addr localhost:", usage + `-addr "localhost:" must have a port, such as localhost:8080`},
		{"-addr nonsense", usage + `-addr "nonsense" must have a port, such as localhost:8080`},
		{"-key=", usage + "-key is empty; give the name of a file"},
		{"-data store/", usage + "-data and -key must name files, not directories"},
		{"-key keys/", usage + "-data and -key must name files, not directories"},
		{"-key " + filepath.Join(directory, "ideas") + " -data ideas", sameFile},
		{"-key ./ideas.tmp -data ideas", sameFile},
		{"-key x/../ideas.lock -data ideas", sameFile},
		{"-key here/ideas -data ideas", sameFile},
		{"-key ideas.lock -data here/ideas", sameFile},
		{"-key link -data garbage", sameFile},
		{"-key garbage.tmp -data link", sameFile},

		{"-addr " + busyAddr, "-addr " + busyAddr + ": listen tcp .*: bind: .*"},
		{"-key garbage", "-key garbage: not a PEM file.*"},
		{"-key blocked.tmp", "-key blocked.tmp: not a regular file.*"},
		{"-key fifo", "-key fifo: not a regular file.*"},
		{"-key null", "-key null: not a regular file.*"},
		{"-key link", "-key link: not a PEM file.*"},
		{"-key dangling", "-key dangling: .*"},
		{"-key missing/key.pem -data ideas", "-key missing/key.pem: .*"},
		{"-data garbage", "-data garbage: line 1: .*"},
		{"-data blocked.tmp", "-data blocked.tmp: not a regular file.*"},
		{"-data fifo", "-data fifo: not a regular file.*"},
		{"-data null", "-data null: not a regular file.*"},
		{"-data held", "-data held: " + "in use by another process; stop that process first"},
		{"-data held2", "-data held2: " + "in use by another process; stop that process first"},
		{"-data dangling", "-data dangling: .*"},
		{"-data garbage/data", "-data garbage/data: .*"},
		{"-data missing/data", "-data missing/data: .*"},
		{"-data blocked", "-data blocked: .*blocked.tmp.*"},
	} {
		var stderr bytes.Buffer
		defaults := []string{"-addr", "localhost:0", "-data", "", "-key", key}
		err := run(stopped, append(defaults, strings.Fields(test.args)...), &stderr)
		want, isUsage := "^"+test.want+"$", strings.HasPrefix(test.want, usage)
		if isUsage {
			want = "^" + test.want + ` \(run ideapool -h for help\)$`
		}
		if !regexp.MustCompile(want).MatchString(fmt.Sprint(err)) || errors.Is(err, errUsage) != isUsage || stderr.Len() > 0 {
			t.Errorf("%s: got the error %v and the output %q, want %s", test.args, err, &stderr, want)
		}
		if after := filesIn(t, "."); after != before {
			t.Fatalf("%s: got the files\n%s\nwant\n%s", test.args, after, before)
		}
	}
}

// TestFlagsAndOutput tests defaults, help, exit status, and what is printed at startup.
func TestFlagsAndOutput(t *testing.T) {
	o, err := parseFlags(nil, io.Discard)
	want := options{"localhost:8080", "ideapool.json", "ideapool.pem", 10 * time.Minute, 720 * time.Hour, "*", false, false}
	if err != nil || o != want {
		t.Errorf("without flags: got %+v, want %+v", o, want)
	}
	var got strings.Builder
	printWelcome(&got, &net.TCPAddr{IP: net.IPv6unspecified, Port: 80}, options{})
	if !strings.HasPrefix(got.String(), "Idea Pool is at http://localhost:80\n  data: in memory, lost when this stops\n") {
		t.Errorf("without a host and a data file: got\n%s", &got)
	}
	for argument, want := range map[string]struct {
		status int
		stderr string
	}{
		"-h": {0, `(?s)^Usage: ideapool \[flags\]\n  -access-ttl .*-addr .*-cors-origin .*-data .*-key .*-quiet.*` +
			`-refresh-ttl .*-trust-proxy[^\n]*\n[^\n]*\n$`},
		"-nope":        {2, "^ideapool: invalid usage: flag provided but not defined: -nope .run ideapool -h for help.\n$"},
		"-addr=x:port": {1, "^ideapool: -addr x:port: .*\n$"},
	} {
		var stderr bytes.Buffer
		command := exec.Command(os.Args[0], argument)
		command.Env, command.Stderr = append(os.Environ(), serveEnv+"=1"), &stderr
		command.Run()
		got := command.ProcessState.ExitCode()
		if got != want.status || !regexp.MustCompile(want.stderr).MatchString(stderr.String()) {
			t.Errorf("%s: got status %d and\n%s\nwant %d and %s", argument, got, &stderr, want.status, want.stderr)
		}
	}
}

// Fuzzing and benchmarks:

// FuzzRequest tests that no method, path, body or header leads to a 5xx, a
// redirect, or a response that breaks the common rules.
func FuzzRequest(f *testing.F) {
	s := newTestServer(f)
	for _, request := range requests(s) {
		method, path, _ := strings.Cut(request, " ")
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
		// The token is a new one if the last was logged out.
		now := time.Now()
		expires, _ := s.store.freeExpiry(jack.ID, now.Unix(), now.Add(time.Hour).Unix())
		access, err := s.tokens.sign(claims{Expires: expires, UserID: jack.ID})
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

// FuzzText tests that text is rejected, or trimmed and otherwise unchanged.
func FuzzText(f *testing.F) {
	for _, s := range []string{"a", " é\n", "a\r\nb", "\u0000", "\ufffd", "<&>", "\u2028", "a\xff", `"\`, "\u00a0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		inJSON, _ := json.Marshal(map[string]string{"content": s})
		inForm := url.Values{"content": {s}}.Encode()
		for _, in := range []*input{newInput(parseObject(inJSON)), newInput(parseForm(inForm))} {
			if got := in.text("content", 255); in.err() == nil && got != strings.TrimSpace(s) {
				t.Errorf("got %q, want %q", got, s)
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

// requests returns a request for each route.
func requests(s *server) (all []string) {
	for _, pattern := range s.patterns {
		all = append(all, strings.Replace(pattern, "{id}", "x", 1))
	}
	return all
}
