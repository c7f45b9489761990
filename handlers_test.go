package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
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
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestCreateIdeaWithoutToken is a plain test to begin with: it makes a request
// and a recorder, calls the server, and compares what was recorded.
func TestCreateIdeaWithoutToken(t *testing.T) {
	s := newTestServer(t)
	r := httptest.NewRequest("POST", "/ideas", strings.NewReader(`{"content":"a","impact":1,"ease":2,"confidence":3}`))
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
	for _, path := range must(filepath.Glob("testdata/api/*.txt")) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if _, err := play(t, path); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

var exercise = flag.String("exercise", "", "the `number` of an exercise that must pass, or none if all must fail")

// TestExercise plays the transcripts of the README's exercises. An unsolved
// exercise must fail, and at the step that follows its mark; a solved one must
// pass. With -exercise 2, only the second is played, and must pass. With
// -exercise none, all must fail: CI uses it on the main branch.
func TestExercise(t *testing.T) {
	number := cmp.Or(strings.TrimPrefix(*exercise, "none"), "*")
	paths := must(filepath.Glob("testdata/exercises/" + number + "-*.txt"))
	if len(paths) == 0 {
		t.Errorf("-exercise %s: there is no such transcript", *exercise)
	}
	for _, path := range paths {
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

// TestNoRouteIsForgotten fails if a new route has no transcript in testdata/api in
// which it succeeds, or no row in the README's table of routes.
func TestNoRouteIsForgotten(t *testing.T) {
	s, played := newTestServer(t), make(map[string]bool)
	for _, path := range must(filepath.Glob("testdata/api/*.txt")) {
		for _, step := range readTranscript(path) {
			if step.want != nil && strings.HasPrefix(step.want[0], "< 2") {
				method, target, _ := strings.Cut(step.request, " ")
				_, pattern := s.mux.Handler(cleanPath(httptest.NewRequest(method, target, nil)))
				played[pattern] = true
			}
		}
	}
	_, table, _ := strings.Cut(readText("README.md"), "\n## API reference\n")
	for _, pattern := range s.patterns {
		if !played[pattern] {
			t.Errorf("%s: there is no transcript of it in testdata/api", pattern)
		}
		if !strings.Contains(table, "\n| `"+pattern+"` |") {
			t.Errorf("%s: it is not in the table of routes in README.md", pattern)
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
	plain, extended := newClient(t, newTestServer(t)), newClient(t, s)
	added := map[string][]string{"NOPE /me": {"405", "LOCK"}, "NOPE /ideas/export": {"405", "GET", "HEAD"}}
	for _, request := range append(requests(s), "GET /nowhere", "GET /", "GET //ideas/") {
		_, path, _ := strings.Cut(request, " ")
		added["OPTIONS "+path] = []string{"204", "LOCK"}
	}
	methods := func(resp testResponse) []string { // after the status
		return strings.Split(resp.Status[:3]+", "+resp.Header.Get("Allow")+resp.Header.Get("Access-Control-Allow-Methods"), ", ")
	}
	for request, want := range added {
		want = append(want, methods(plain.send(request, ""))...)
		slices.Sort(want)
		if got := methods(extended.send(request, "")); !slices.Equal(got, slices.Compact(want)) {
			t.Errorf("%s: got the methods %q, want %q", request, got, want)
		}
	}
	extended.expect("LOCK /me", "", "200")
	extended.expect("GET /ideas/export", "", "200")
}

func readText(path string) string {
	return strings.ReplaceAll(string(must(os.ReadFile(path))), "\r", "")
}

// TestTour plays the curl lines of the README's tour. Each response must be the
// one shown there, except for ids, times and tokens.
func TestTour(t *testing.T) {
	c := newClient(t, newTestServer(t))
	_, tour, _ := strings.Cut(readText("README.md"), "## A tour")
	_, tour, _ = strings.Cut(tour, "```sh\n")
	tour, _, _ = strings.Cut(tour, "```")
	varying := regexp.MustCompile(`"(jwt|refresh_token|id)":"[^"]*"|"created_at":\d+`)
	//                           NAME=$(   curl ARGUMENTS | sed …"MEMBER"…   # response
	lines := regexp.MustCompile(`(?:(\w+)=\$\()?curl (.*?)(?: \| .*"(\w+)".*)?\n(?:# ([{[].*)\n)?`).FindAllStringSubmatch(tour, -1)
	for _, line := range lines {
		name, arguments, wanted, want := line[1], line[2], line[3], line[4]
		got := c.curl(arguments)
		if name != "" {
			c.names[name] = member(got, wanted)
		} else if varying.ReplaceAllString(got, "…") != varying.ReplaceAllString(want, "…") {
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

// Tables, with one line for each kind of request. Their most frequent words:
const (
	withToken   = "X-Access-Token: $jwt" // see client.signUp
	anIdea      = `{"content":"a","impact":1,"ease":2,"confidence":3}`
	jacksLogin  = `{"email":"jack@test.com","password":"the-Secret-123"}`
	jacksSignUp = `{"email":"jack@test.com","name":"Jack","password":"the-Secret-123"}`
	wrongLogin  = "400 wrong e-mail or password"
)

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
	c.expect("POST /ideas", atLimit, "201", withToken)
	for _, request := range append(requests(s), "POST /nowhere", "PATCH /me") {
		c.expect(request, atLimit+" ", "413 the body must be at most 64 KiB")
	}
	// A body without a Content-Length is rejected while it is read.
	for body, want := range map[string]int{atLimit: 422, atLimit + " ": 413} {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest("POST", "/users", io.MultiReader(strings.NewReader(body))))
		if w.Code != want {
			t.Errorf("%d bytes in chunks: got status %d, want %d", len(body), w.Code, want)
		}
	}
}

// TestFields tests both sides of every rule for a field. The other fields of
// each request are valid.
func TestFields(t *testing.T) {
	const (
		control    = "must not contain control characters or U+FFFD"
		badToken   = "400 the refresh token is unknown, expired or logged out"
		badScore   = "422 impact must be an integer from 1 to 10"
		tooLong    = "must be at most 255 characters long"
		emailTaken = "409 this e-mail is already registered" // the fields are valid
	)
	bodies := map[string]string{
		"POST /users":                 jacksSignUp,
		"POST /access-tokens":         jacksLogin,
		"POST /access-tokens/refresh": `{"refresh_token":"x"}`,
		"POST /ideas":                 anIdea,
	}
	long := func(s string, n int) string { return strings.Repeat(s, n) }
	c := newClient(t, newTestServer(t))
	c.signUp()
	for _, test := range []struct {
		route, field, want string
		values             []string
	}{
		{"POST /users", "email", emailTaken, []string{`"jack@test.com"`, `"\t JACK@test.com\r\n"`}},
		{"POST /users", "email", "201", []string{`"` + long("a", 250) + `@b.c"`}},
		{"POST /users", "email", "422 email must be at most 254 characters long", []string{`"` + long("a", 251) + `@b.c"`}},

		{"POST /users", "name", emailTaken, []string{`" J "`, `"` + long("é", 255) + `"`}},
		{"POST /users", "name", "422 name " + tooLong, []string{`"` + long("é", 256) + `"`}},

		{"POST /users", "password", emailTaken, []string{`"aB3aB3aB"`, `"éÉ3éÉ3éÉ"`, `"aB3` + long("x", 1021) + `"`, `"aB3 \t\r\n aB3"`}},
		{"POST /users", "password", "422 password must be at most 1024 bytes long", []string{`"aB3` + long("x", 1022) + `"`}},

		{"POST /access-tokens", "email", wrongLogin, []string{`"nobody"`, `"nobody@test.com"`, `"jac\u212a@test.com"`, `"` + long("a", 251) + `@b.c"`}},
		{"POST /access-tokens", "password", wrongLogin, []string{`"short"`, `" the-Secret-123"`}},
		{"POST /access-tokens/refresh", "refresh_token", badToken, []string{`"x"`, `"` + long("x", 60_000) + `"`}},

		{"POST /ideas", "content", "201", []string{`" \u0061\r\n\tb "`, `"` + long("😀", 255) + `"`, `"  ` + long("a", 255) + `  "`}},
		{"POST /ideas", "content", "422 content " + tooLong, []string{`"` + long("😀", 256) + `"`}},
		{"POST /ideas", "content", "422 content must not be empty", []string{`" \t\r\n\u00a0"`}},
		{"POST /ideas", "content", "422 content " + control, []string{`"a\u000bb"`, `"a\u007fb"`, `"a\u0085b"`, `"\udc00"`}},
		{"POST /ideas", "content", "422 content must be text", []string{`null`, `7`, `{"a":1}`}},

		{"POST /ideas", "impact", "201", []string{`1`, `10`, `"1"`, `"10"`, `"\u0038"`}},
		{"POST /ideas", "impact", badScore, []string{`0`, `11`, `-1`, `-0`, `8.5`, `8.0`, `1e1`, `65537`, `18446744073709551617`}},
		{"POST /ideas", "impact", badScore, []string{`true`, `null`, `[8]`, `""`, `" 8"`, `"+8"`, `"8.0"`, `"٨"`, `"\\8"`}},
	} {
		for _, value := range test.values {
			var members map[string]json.RawMessage
			json.Unmarshal([]byte(bodies[test.route]), &members)
			members[test.field] = json.RawMessage(value)
			c.expect(test.route, string(must(json.Marshal(members))), test.want, withToken)
		}
	}
}

func TestPageNumbers(t *testing.T) {
	c := newClient(t, newTestServer(t))
	c.signUp()
	for query := range strings.FieldsSeq("? ?page=1 ?page=03 ?page=1&x=%zz ?x=1&x=2;y ?q=100% ?Page=0 ?page=9223372036854775807") {
		c.expect("GET /ideas"+query, "", "200", withToken)
	}
	for page := range strings.FieldsSeq("0 -1 1.0 one %201 %2B1 1e1 0x1 18446744073709551616 9223372036854775808 %zz 1; 1&page=2 2;x=1 &x=1 1&%70age=1") {
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
	check(true, strings.Fields(`* none https://a.example https://a.example:8443 https://a.example:80 http://a.example:443 http://localhost:3000
		http://localhost:65535 http://a:1 capacitor://localhost tauri://localhost chrome-extension://abcdef http://192.168.0.1 http://[::1]:8080
		http://[2001:db8::1] https://xn--bcher-kva.example http://a_b.example https://1a.example`)...)
	check(false, strings.Fields(`null None ** a.example //a.example https:a.example https:// https://a.example/ https://a.example/b
		https://a.example?b https://a.example# https://a.example,https://b.example https://*.example https://* https://A.example HTTPS://a.example
		https://bücher.example https://user@a.example https://a.example: https://a.example:443 http://a:80 http://a:0 http://a:65536 http://a:08080
		http://a:-1 http://a:b http://127.1 http://127.0.0.01 http://0x7f.0.0.1 http://2130706433 http://256.0.0.1 http://127.0.0.1. http://[0:0::1]
		http://[::1 http://[::1%eth0] http://[::FFFF] http://[127.0.0.1] http://::1 file:// file://localhost file:///index.html`)...)
	check(false, "", " https://a.example", "https://a.example\n")
}

// TestFullDisk makes changes, without effect, while the disk has room for 30 bytes.
func TestFullDisk(t *testing.T) {
	var full atomic.Bool
	var writes atomic.Int32
	s := newTestServer(t)
	s.store = mustStart(t, scratch(t), func(op, path string, do func() error) error {
		if op != "write" {
			return do()
		}
		writes.Add(1)
		before := must(os.Stat(path)).Size()
		if err := do(); err != nil || !full.Load() || must(os.Stat(path)).Size() < before+30 {
			return err
		}
		return io.ErrShortWrite
	})
	c := newClient(t, s)
	c.signUp()
	const notSaved = "503 cannot save changes right now; please try again"
	full.Store(true)
	for _, test := range []struct{ request, body, want string }{
		{"POST /ideas", anIdea, notSaved},
		{"POST /users", `{"email":"jill@test.com","name":"Jill","password":"the-Secret-123"}`, notSaved},
		{"POST /access-tokens", jacksLogin, notSaved},
		{"DELETE /access-tokens", `{"refresh_token":"$refresh"}`, notSaved},
		{"GET /me", "", "200"}, // the logout has ended nothing
		{"POST /access-tokens/refresh", `{"refresh_token":"$refresh"}`, "200"},
		{"GET /healthz", "", notSaved},
		{"POST /users", jacksSignUp, "409 this e-mail is already registered"}, // such changes do not get as far as the disk
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

// TestConcurrentAttempts makes 30 attempts at once. Apart from the first ten, only
// those that were already being checked get through. With the right password,
// clients do not throttle each other.
func TestConcurrentAttempts(t *testing.T) {
	for _, slots := range []int{1, 14} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.hashing = make(semaphore, slots)
			c := newClient(t, s)
			for _, burst := range []struct{ least, most, wait int }{{10, 9 + slots, 30}, {1, 1, 60}, {1, 1, 120}} {
				for range slots { // so that all attempts wait for a slot first
					go s.hashing.do(t.Context(), func() error { time.Sleep(time.Second); return nil })
				}
				synctest.Wait()
				var checked atomic.Int32
				atOnce(30, func(int) {
					resp := c.send("POST /access-tokens", `{"email":"a@b.c","password":"x"}`)
					if resp.StatusCode == http.StatusBadRequest {
						checked.Add(1)
					} else if got := resp.Header.Get("Retry-After"); resp.StatusCode != http.StatusTooManyRequests || got != strconv.Itoa(burst.wait) {
						t.Errorf("got status %d and Retry-After %s, want 429 and %d", resp.StatusCode, got, burst.wait)
					}
				})
				if n := int(checked.Load()); n < burst.least || n > burst.most {
					t.Errorf("with %d slots, %d of 30 attempts were checked, want %d to %d", slots, n, burst.least, burst.most)
				}
				time.Sleep(time.Duration(burst.wait) * time.Second)
			}
			c.signUp()
			atOnce(30, func(int) { c.expect("POST /access-tokens", jacksLogin, "201") })
		})
	}
}

func TestThrottleIsBounded(t *testing.T) {
	throttle := loginThrottle{failures: make(map[attempt]failures)}
	for n := range 100_001 {
		throttle.end(attempt{email: [32]byte{byte(n), byte(n >> 8), byte(n >> 16)}}, false)
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
	s := newServer(options{}, rfcKey(), nil, quiet)
	one, other := must(s.hashPassword(t.Context(), "the-Secret-123")), must(s.hashPassword(t.Context(), "the-Secret-123"))
	for _, hash := range []string{one, dummyHash(s.hashCost)} {
		if !strings.HasPrefix(hash, "$argon2id$v=19$m=19456,t=2,p=1$") {
			t.Errorf("got the hash %s, want m=19456,t=2,p=1", hash)
		}
	}
	if one == other {
		t.Error("two hashes of one password are equal, want different salts")
	}
}

// TestSemaphore tests the limit of concurrent hashes: two are computed at a time,
// and others wait for at most 5 seconds, or until their client has gone.
func TestSemaphore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hashing, start := make(semaphore, 2), time.Now()
		work := func() error { time.Sleep(3 * time.Second); return nil }
		gone, leave := context.WithCancel(t.Context())
		leave()
		for range 2 {
			go hashing.do(t.Context(), work)
		}
		synctest.Wait()
		got := make([]string, 5)
		atOnce(5, func(n int) {
			ctx := []context.Context{gone, t.Context()}[min(n, 1)]
			err := hashing.do(ctx, work)
			got[n] = fmt.Sprint(time.Since(start), errors.Is(err, errBusy))
		})
		slices.Sort(got[1:])
		if want := []string{"0s true", "5s true", "5s true", "6s false", "6s false"}; !slices.Equal(got, want) {
			t.Errorf("got (when, busy) %q, want %q", got, want)
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
		go s.hashing.do(t.Context(), func() error { time.Sleep(11 * time.Second); return nil })
		synctest.Wait()
		const busy = "503 too many people are logging in or signing up right now; please try again"
		atOnce(40, func(n int) {
			c.expect("POST /access-tokens", jacksLogin, busy)
			c.expect("POST /users", fmt.Sprintf(`{"email":"a%d@b.c","name":"A","password":"the-Secret-123"}`, n), busy)
		})
		c.expect("POST /access-tokens", jacksLogin, "201")
	})
}

// Connections, panics and the log:

// TestSlowClients sends a byte now and then. Such clients are disconnected, and
// block nobody. In the synctest bubble, the network is a pipe.
func TestSlowClients(t *testing.T) {
	for sent, timeout := range map[string]time.Duration{
		"GET /healthz HTTP/1.1\r\nHost: x\r\nX-":                           5 * time.Second,
		"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{": 10 * time.Second,
	} {
		synctest.Test(t, func(t *testing.T) {
			network, stop := startServing(t, newTestServer(t))
			start := time.Now()
			slow := network.dial()
			go func() {
				io.WriteString(slow, sent)
				for err := error(nil); err == nil; time.Sleep(time.Second) {
					_, err = io.WriteString(slow, "a")
				}
			}()
			quick := network.dial()
			go io.WriteString(quick, "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			if got, _ := io.ReadAll(quick); !bytes.HasPrefix(got, []byte("HTTP/1.1 200 OK")) || time.Since(start) > 0 {
				t.Errorf("another client got %s after %v, want 200 OK at once", got, time.Since(start))
			}
			io.Copy(io.Discard, slow) // until it is disconnected
			if took := time.Since(start); took < timeout || took > timeout+time.Second {
				t.Errorf("%q: disconnected after %v, want %v", sent, took, timeout)
			}
			stop()
		})
	}
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
		{"POST /users", expect + "Content-Length: 9\r\nContent-Type: text/plain", http.StatusUnsupportedMediaType},
		{"OPTIONS /ideas", expect + "Content-Length: 9", http.StatusNoContent},
	} {
		synctest.Test(t, func(t *testing.T) {
			network, stop := startServing(t, newTestServer(t))
			conn, start := network.dial(), time.Now()
			go io.WriteString(conn, test.request+" HTTP/1.1\r\nHost: x\r\n"+test.header+"\r\n\r\n")
			resp := must(http.ReadResponse(bufio.NewReader(conn), nil))
			if took := time.Since(start); resp.StatusCode != test.want || took > 0 {
				t.Errorf("%s, %q: got status %d after %v, want %d at once", test.request, test.header, resp.StatusCode, took, test.want)
			}
			conn.Close()
			stop()
		})
	}
}

// TestShutdown stops the server during a request, which gets 10 s to finish.
func TestShutdown(t *testing.T) {
	for takes, want := range map[time.Duration]time.Duration{9 * time.Second: 9 * time.Second, 20 * time.Second: 10 * time.Second} {
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
			if responds := bytes.HasSuffix(response, []byte(`"done"`)); responds != (takes == want) || took < want || took > want+time.Second {
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
		wantError(t, "serving", <-done, nil)
	}
}

// TestFailingHandlers has handlers that fail before, during and after a response.
// What was written stays, nothing follows it, and there is one line in the log.
func TestFailingHandlers(t *testing.T) {
	const internal = `500 {"reason":"something went wrong on the server"}`
	failed := errors.New("a secret")
	writeHalf := func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		io.WriteString(w, `{"half":`)
	}
	for _, test := range []struct {
		want, log string
		handle    func(w http.ResponseWriter) error
	}{
		{internal, `error="a secret"`, func(http.ResponseWriter) error { return failed }},
		{internal, `error="panic: a secret.*handlers_test.go`, func(http.ResponseWriter) error { panic(failed) }},
		{internal, "unsupported type", func(w http.ResponseWriter) error { return writeJSON(w, 200, make(chan int)) }},
		{`200 {"half":`, `error="a secret"`, func(w http.ResponseWriter) error { writeHalf(w); return failed }},
		{`200 {"half":`, `error="panic: a secret`, func(w http.ResponseWriter) error { writeHalf(w); panic(failed) }},
		{"204 ", `error="a secret"`, func(w http.ResponseWriter) error { w.WriteHeader(204); return failed }},
	} {
		var log bytes.Buffer
		s := newTestServer(t)
		s.logger = newLogger(&log, true)
		s.handle("GET /test", func(w http.ResponseWriter, _ *http.Request) error { return test.handle(w) })
		c := newClient(t, s)
		resp := c.send("GET /test", "")
		line := regexp.MustCompile(`^time=\S+ level=ERROR msg=request method=GET path=/test status=` + test.want[:3] + ` .*` + test.log + `.*\n$`)
		if got := fmt.Sprint(resp.StatusCode, " ", resp.body); got != test.want || !line.MatchString(log.String()) {
			t.Errorf("got %s and the log\n%s\nwant %s and\n%s", got, &log, test.want, line)
		}
		c.expect("GET /healthz", "", "200")
	}
}

// TestFlushAndAbort tests that a handler can flush and abort its response.
func TestFlushAndAbort(t *testing.T) {
	s, w := newTestServer(t), httptest.NewRecorder()
	s.handle("GET /flush", func(w http.ResponseWriter, _ *http.Request) error { return http.NewResponseController(w).Flush() })
	s.handle("GET /abort", func(http.ResponseWriter, *http.Request) error { panic(http.ErrAbortHandler) })
	s.ServeHTTP(w, httptest.NewRequest("GET", "/flush", nil))
	if !w.Flushed || w.Code != http.StatusOK {
		t.Errorf("got flushed %t with status %d, want true, 200", w.Flushed, w.Code)
	}
	defer func() {
		if p := recover(); p != http.ErrAbortHandler {
			t.Errorf("got the panic %v, want http.ErrAbortHandler", p)
		}
	}()
	s.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/abort", nil))
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
		`level=INFO msg=request method=POST path=/users status=201 duration=\S+ id=\w+-1`,
		`level=INFO msg=request method=DELETE path=//access-tokens/ status=204 duration=\S+ id=\w+-2`,
		`level=WARN msg=request method=POST path=/access-tokens status=400 duration=\S+ id=\w+-3 error="wrong e-mail or password"`,
		`level=INFO msg=request method=GET path="/a%0aevil=1%1b\[31m" status=404 duration=\S+ id=\w+-4`,
		`level=INFO msg=request method=GET path="/\\"b\\"\\\\" status=404 duration=\S+ id=\w+-5`,
		`level=INFO msg=request method=GET path=/c status=404 duration=\S+ id=\w+-6`,
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
	wantError(t, "a pipe", err, nil)
	go func() {
		defer stderr.Close()
		if err := run(ctx, append(flags, "-addr", "localhost:0"), stderr); err != nil {
			t.Error(err)
		}
	}()
	lines, output := bufio.NewReader(r), ""
	stop = func() string {
		cancel()
		output += string(must(io.ReadAll(lines)))
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
	for impact := range 3 {
		c.expect("POST /ideas", fmt.Sprintf(`{"content":"a","impact":%d,"ease":1,"confidence":1}`, impact+1), "201", withToken)
	}
	before := c.send("GET /ideas", "", withToken).body
	if output := stop(); !regexp.MustCompile("^" + welcome + "(time=.* msg=request .*\n){5}$").MatchString(output) {
		t.Errorf("got the output\n%s\nwant\n%s and five lines of the log", output, welcome)
	}
	for _, file := range must(os.ReadDir(".")) {
		for _, secret := range []string{"the-Secret", c.names["jwt"], c.names["refresh"]} {
			if bytes.Contains(must(os.ReadFile(file.Name())), []byte(secret)) {
				t.Errorf("%s contains %s", file.Name(), secret)
			}
		}
	}
	writeFile(t, "ideapool.json", append(must(os.ReadFile("ideapool.json")), '{'))
	names := c.names
	c, stop = startCommand(t, "-quiet")
	c.names = names
	if after := c.send("GET /ideas", "", withToken).body; after != before || strings.Count(after, "content") != 3 {
		t.Errorf("after a restart, got the list\n%s\nwant\n%s", after, before)
	}
	c.expect("POST /access-tokens/refresh", `{"refresh_token":"$refresh"}`, "200")
	c.expect("POST /access-tokens", jacksLogin, "201")
	if output := stop(); !regexp.MustCompile("^time=.* level=WARN .* line=8\n" + welcome + "$").MatchString(output) {
		t.Errorf("with -quiet, got the output\n%s\nwant a warning about line 8 and\n%s", output, welcome)
	}
}

// TestCommandInMemory starts the command without a data file. It still makes a
// key, and warns when others can read it. Headers are limited to 16 KiB.
func TestCommandInMemory(t *testing.T) {
	t.Chdir(t.TempDir())
	_, stop := startCommand(t, "-data", "")
	stop()
	os.Chmod("ideapool.pem", 0o644)
	c, stop := startCommand(t, "-data", "")
	for size, want := range map[int]int{15 << 10: 401, 17 << 10: 431} {
		r := must(http.NewRequest("GET", c.url+"/me", nil))
		r.Header.Set("X", strings.Repeat("x", size))
		r.Close = true // as net/http may have read 4 KiB of a second request
		resp := must(c.transport.RoundTrip(r))
		if resp.Body.Close(); resp.StatusCode != want {
			t.Errorf("a header of %d bytes: got status %d, want %d", size, resp.StatusCode, want)
		}
	}
	if output := stop(); runtime.GOOS != "windows" && !regexp.MustCompile("level=WARN .*chmod 600.*ideapool.pem").MatchString(output) {
		t.Errorf("got the output\n%s\nwant a warning about the key", output)
	}
	if files := must(os.ReadDir(".")); len(files) != 1 || files[0].Name() != "ideapool.pem" {
		t.Errorf("got the files %v, want ideapool.pem", files)
	}
}

// TestBadStarts tests that an error at the start is one line that names the flag
// or the file, and that no file is changed or left behind.
func TestBadStarts(t *testing.T) {
	busy := must(net.Listen("tcp", "localhost:0"))
	defer busy.Close()
	t.Chdir(t.TempDir())
	os.MkdirAll("blocked.tmp/x", 0o700) // so that blocked cannot be written
	os.WriteFile("garbage", []byte("garbage"), 0o600)
	if exec.Command("mkfifo", "fifo").Run() != nil { // there are none on Windows
		os.Mkdir("fifo", 0o700)
	}
	for link, target := range map[string]string{"link": "garbage", "here": ".", "null": os.DevNull, "dangling": "nothing", "held2": "held"} {
		if symlink(target, link) != nil {
			t.Skip("this system has no symbolic links")
		}
	}
	mustStart(t, "held", noSync)
	for _, name := range []string{"garbage", "blocked", "ideas"} {
		writeFile(t, name+".lock", nil) // which a start may make
	}
	before := filesIn(".")
	stopped, stop := context.WithCancel(t.Context()) // if it starts, it stops at once
	stop()
	const (
		usage     = "invalid usage: "
		badOrigin = usage + `-cors-origin ".*" is not an origin as browsers send it; give '[*]', none, or one such as https://example.org`
		badTime   = usage + "-access-ttl and -refresh-ttl must be 1s or more"
		sameFile  = usage + "-key is one of the files that -data uses; choose another name"
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
		{"-key " + must(filepath.Abs("ideas")) + " -data ideas", sameFile},
		{"-key ./ideas.tmp -data ideas", sameFile},
		{"-key x/../ideas.lock -data ideas", sameFile},
		{"-key here/ideas -data ideas", sameFile},
		{"-key ideas.lock -data here/ideas", sameFile},
		{"-key link -data garbage", sameFile},
		{"-key garbage.tmp -data link", sameFile},

		{"-addr " + busy.Addr().String(), "-addr " + busy.Addr().String() + ": listen tcp .*; choose another address"},
		{"-key garbage", "-key garbage: not a PEM file.*"},
		{"-key blocked.tmp", "-key blocked.tmp: not a regular file.*"},
		{"-key fifo", "-key fifo: not a regular file.*"},
		{"-key missing/key.pem -data ideas", "-key missing/key.pem: .*; check that .*"},
		{"-data garbage", "-data garbage: line 1: .*restore a backup.*"},
		{"-data blocked.tmp", "-data blocked.tmp: not a regular file.*"},
		{"-data fifo", "-data fifo: not a regular file.*"},
		{"-data null", "-data null: not a regular file.*"},
		{"-data held", "-data held: " + "in use by another process; stop that process first"},
		{"-data held2", "-data held2: " + "in use by another process; stop that process first"},
		{"-data dangling", "-data dangling: .*"},
		{"-data garbage/data", "-data garbage/data: .*; check that .*"},
		{"-data missing/data", "-data missing/data: .*; check that .*"},
		{"-data blocked", "-data blocked: .*; check that .*"},
	} {
		var stderr bytes.Buffer
		defaults := []string{"-addr", "localhost:0", "-data", "", "-key", "unused.pem"}
		err := run(stopped, append(defaults, strings.Fields(test.args)...), &stderr)
		want, isUsage := "^"+test.want+"$", strings.HasPrefix(test.want, usage)
		if isUsage {
			want = "^" + test.want + ` \(run ideapool -h for help\)$`
		}
		if !regexp.MustCompile(want).MatchString(fmt.Sprint(err)) || errors.Is(err, errUsage) != isUsage || stderr.Len() > 0 {
			t.Errorf("%s: got the error %v and the output %q, want %s", test.args, err, &stderr, want)
		}
		compare(t, test.args+": the files", filesIn("."), before)
	}
}

// TestFlagsAndOutput tests defaults, help, exit status, and what is printed at startup.
func TestFlagsAndOutput(t *testing.T) {
	o, err := parseFlags(nil, io.Discard)
	if want := (options{"localhost:8080", "ideapool.json", "ideapool.pem", 10 * time.Minute, 720 * time.Hour, "*", false}); err != nil || o != want {
		t.Errorf("without flags: got %+v, want %+v", o, want)
	}
	var got strings.Builder
	printWelcome(&got, &net.TCPAddr{IP: net.IPv6unspecified, Port: 80}, options{})
	if want := "Idea Pool is at http://localhost:80\n  data: in memory, lost when this stops\n"; !strings.HasPrefix(got.String(), want) {
		t.Errorf("without a host: got\n%s\nwant\n%s", &got, want)
	}
	for argument, want := range map[string]struct {
		status int
		stderr string
	}{
		"-h":           {0, `(?s)^Usage: ideapool \[flags\]\n  -access-ttl .*-addr .*-cors-origin .*-data .*-key .*-quiet.*-refresh-ttl [^\n]*\n[^\n]*\n$`},
		"-nope":        {2, "^ideapool: invalid usage: flag provided but not defined: -nope .run ideapool -h for help.\n$"},
		"-addr=x:port": {1, "^ideapool: -addr x:port: .*; choose another address\n$"},
	} {
		var stderr bytes.Buffer
		command := exec.Command(os.Args[0], argument)
		command.Env, command.Stderr = append(os.Environ(), serveEnv+"=1"), &stderr
		command.Run()
		if got := command.ProcessState.ExitCode(); got != want.status || !regexp.MustCompile(want.stderr).MatchString(stderr.String()) {
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
		f.Add(method, path, "application/json", `{"content":"a","impact":"8","ease":9,"confidence":10}`)
		f.Add(method, path+"?page=2", "application/x-www-form-urlencoded", "refresh_token=a%00&email=a%40b.c")
	}
	f.Add("CONNECT", "/ideas/../me", "", "[]")
	f.Add("GET", "*", "", "")
	c := newClient(f, s)
	c.signUp()
	jack, _ := s.store.userByEmail("jack@test.com")
	f.Fuzz(func(t *testing.T, method, path, contentType, body string) {
		u, err := url.ParseRequestURI(path)
		if err != nil || !regexp.MustCompile("^[A-Z]+$").MatchString(method) {
			t.Skip()
		}
		// The token is a new one if the last was logged out.
		now := time.Now()
		expires, _ := s.store.freeExpiry(jack.ID, now.Unix(), now.Add(time.Hour).Unix())
		for _, token := range []string{"", must(s.tokens.sign(claims{Expires: expires, UserID: jack.ID}))} {
			c := &client{t: t, origin: "*"}
			header := http.Header{"Content-Type": {contentType}, "X-Access-Token": {token}}
			r := &http.Request{Method: method, URL: u, Body: io.NopCloser(strings.NewReader(body)), Header: header}
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			if resp := c.read(r, w.Result()); resp.StatusCode >= 500 || resp.StatusCode/100 == 3 {
				t.Errorf("%s %s: got %s", method, path, resp.Status)
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
		inJSON := must(json.Marshal(map[string]string{"content": s}))
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
		method, target, _ := strings.Cut(c.expand(request), " ")
		r := httptest.NewRequest(method, target, nil)
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

// Helpers (others are in the other test files):

// newTestServer returns a server that keeps everything in memory and signs with
// rfcKey, unless the flags of the command say otherwise. Its hashes are cheap.
func newTestServer(t testing.TB, flags ...string) *server {
	o := must(parseFlags(append([]string{"-data="}, flags...), io.Discard))
	key := rfcKey()
	if o.key != "ideapool.pem" {
		key = must(readKey(o.key))
	}
	store := must(openStore(o.data, realDisk, quiet))
	wantError(t, "a start", store.start(), nil)
	t.Cleanup(func() { abandon(store) })
	s := newServer(o, key, store, quiet)
	s.hashCost = argonCost{memory: 64, passes: 1, threads: 1}
	return s
}

// requests returns a request for each route.
func requests(s *server) (all []string) {
	for _, pattern := range s.patterns {
		all = append(all, strings.Replace(pattern, "{id}", "x", 1))
	}
	return all
}

// A client sends requests to a server.
type client struct {
	t         testing.TB
	url       string
	transport http.RoundTripper
	origin    string            // of Access-Control-Allow-Origin in every response
	names     map[string]string // what $name stands for
}

// newClient returns a client of a handler behind a network in memory. The header
// From sets the address from which a request seems to come.
func newClient(t testing.TB, h http.Handler) *client {
	network := make(pipes)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.RemoteAddr = r.Header.Get("From")
		h.ServeHTTP(w, r)
	})}
	go server.Serve(network)
	transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return network.dial(), nil }}
	t.Cleanup(func() { transport.CloseIdleConnections(); server.Close() })
	return &client{t, "http://test", transport, "*", make(map[string]string)}
}

// A testResponse is a response whose body has been read.
type testResponse struct {
	*http.Response
	body, reason string
}

// signUp signs up Jack, and keeps his tokens as $jwt and $refresh.
func (c *client) signUp() {
	c.t.Helper()
	resp := c.send("POST /users", jacksSignUp)
	if resp.StatusCode != http.StatusCreated {
		c.t.Fatalf("signing up: %s", resp.body)
	}
	c.names["jwt"], c.names["refresh"] = member(resp.body, "jwt"), member(resp.body, "refresh_token")
}

// send sends a request, such as "GET /me", with headers such as "Name: value". A
// body is JSON unless they say otherwise.
func (c *client) send(request, body string, headers ...string) testResponse {
	c.t.Helper()
	method, target, _ := strings.Cut(c.expand(request), " ")
	r := must(http.NewRequest(method, c.url+target, strings.NewReader(c.expand(body))))
	if body != "" && !slices.ContainsFunc(headers, func(h string) bool { return strings.HasPrefix(h, "Content-Type:") }) {
		r.Header.Set("Content-Type", "application/json")
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(c.expand(header), ":")
		r.Header.Add(name, strings.TrimSpace(value))
	}
	resp, err := c.transport.RoundTrip(r)
	if err != nil {
		c.t.Fatalf("%s: %v", request, err)
	}
	return c.read(r, resp)
}

// read reads the body of a response, and checks what is true of every response.
func (c *client) read(r *http.Request, resp *http.Response) testResponse {
	c.t.Helper()
	body := string(must(io.ReadAll(resp.Body)))
	read := testResponse{resp, body, member(body, "reason")}
	for rule, holds := range checkEveryResponse(read, r.Method, c.origin) {
		if !holds {
			c.t.Errorf("%s %s: a rule for every response is broken: %s\n%s %v\n%s", r.Method, r.URL, rule, resp.Status, resp.Header, body)
		}
	}
	return read
}

// checkEveryResponse checks what is true of every response in these tests.
func checkEveryResponse(resp testResponse, method, origin string) map[string]bool {
	has := func(name, value string) bool { return resp.Header.Get(name) == value }
	status, body := resp.StatusCode, resp.body
	var problem struct{ Fields fieldErrors }
	json.Unmarshal([]byte(body), &problem)
	return map[string]bool{
		"X-Content-Type-Options is nosniff":               has("X-Content-Type-Options", "nosniff"),
		"X-Frame-Options is SAMEORIGIN":                   has("X-Frame-Options", "SAMEORIGIN"),
		"Cache-Control is no-store":                       has("Cache-Control", "no-store"),
		"there is an X-Request-Id":                        !has("X-Request-Id", ""),
		"Access-Control-Allow-Origin is " + origin:        has("Access-Control-Allow-Origin", origin),
		"a 204 has neither a body nor a Content-Type":     status != 204 || body == "" && has("Content-Type", ""),
		"others have JSON":                                status == 204 || has("Content-Type", "application/json; charset=utf-8"),
		"nothing comes in chunks":                         len(resp.TransferEncoding) == 0,
		"an error has a reason":                           status < 400 || resp.reason != "" || method == "HEAD" && body == "",
		"only an error has a reason":                      status >= 400 || resp.reason == "",
		"no body has a numeric status":                    !regexp.MustCompile(`"status":\s*[-\d]`).MatchString(body),
		"the reason of a 422 names the fields":            status != 422 || resp.reason == problem.Fields.Error(),
		"only a 422 has fields":                           status == 422 || problem.Fields == nil,
		"a 401, and nothing else, has WWW-Authenticate":   has("WWW-Authenticate", "Bearer") == (status == 401),
		"a 405, and nothing else, has Allow":              has("Allow", "") == (status != 405),
		"a 429 or 503, and nothing else, has Retry-After": has("Retry-After", "") == (status != 429 && status != 503),
		"ids have 9 characters of [0-9a-z]":               !strings.Contains(regexp.MustCompile(`"id":"[0-9a-z]{9}"`).ReplaceAllString(body, ""), `"id":`),
		"a refresh token consists of 100 hex digits":      member(body, "refresh_token") == "" || regexp.MustCompile(`^[0-9a-f]{100}$`).MatchString(member(body, "refresh_token")),
	}
}

// expect checks a response against "201" or "404 you have no such idea".
func (c *client) expect(request, body, want string, headers ...string) {
	c.t.Helper()
	resp := c.send(request, body, headers...)
	if got := strings.TrimSpace(fmt.Sprint(resp.StatusCode, " ", resp.reason)); got != want {
		c.t.Errorf("%s %q\n%.100s\n got %s\nwant %s", request, headers, body, got, want)
	}
}

// play plays the transcript in a file, and returns the first step that fails. It
// must be called in a synctest bubble.
func play(t *testing.T, path string) (step, error) {
	time.Sleep(time.Until(time.Unix(1553657927, 0)))
	c, repeat := newClient(t, newTestServer(t)), 1
	c.names["dir"] = t.TempDir()
	for _, step := range readTranscript(path) {
		command, argument, _ := strings.Cut(step.command, " ")
		switch command {
		case "":
			for _, body := range slices.Repeat(step.bodies, repeat) {
				if problem := c.check(step, body); problem != "" {
					return step, fmt.Errorf("%s:%d: %s", path, step.line, problem)
				}
			}
			repeat = 1
		case "ideapool":
			dir := t.TempDir() // with the files as a kill would leave them
			c.names["dir"] = must(dir, os.CopyFS(dir, os.DirFS(c.names["dir"])))
			flags := strings.Fields(c.expand(argument))
			c.transport, c.origin = newClient(t, newTestServer(t, flags...)).transport, "*"
			if i := slices.Index(flags, "-cors-origin"); i >= 0 {
				c.origin = strings.TrimPrefix(flags[i+1], "none")
			}
		case "sleep":
			time.Sleep(must(time.ParseDuration(argument)))
		case "repeat":
			repeat = must(strconv.Atoi(argument))
		default:
			return step, fmt.Errorf("%s:%d: there is no command %s", path, step.line, command)
		}
	}
	return step{}, nil
}

// A step of a transcript is a request and the lines of its response, or a command.
type step struct {
	line    int
	marked  bool // see TestExercise
	command string
	request string
	headers []string
	bodies  []string // the request is sent with each of them
	want    []string
}

// readTranscript reads the steps of a transcript. See document.txt for its format.
func readTranscript(path string) (steps []step) {
	marked := false
	for n, line := range strings.Split(string(must(os.ReadFile(path))), "\n") {
		line = strings.TrimSpace(line)
		sent, isSent := strings.CutPrefix(line, "> ")
		command, isCommand := strings.CutPrefix(line, "$ ")
		last := len(steps) - 1
		switch {
		case line == "", line[0] == '#':
			marked = marked || line == "# Fails until the exercise is solved."
		case isCommand:
			steps = append(steps, step{line: n + 1, command: command})
		case isSent && strings.Contains(sent, " /"):
			steps = append(steps, step{line: n + 1, marked: marked, request: sent})
			marked = false
		case isSent:
			steps[last].headers = append(steps[last].headers, sent)
		case line[0] == '<', steps[last].want != nil:
			steps[last].want = append(steps[last].want, line)
		default:
			steps[last].bodies = append(steps[last].bodies, line)
		}
	}
	for n := range steps {
		if steps[n].bodies == nil {
			steps[n].bodies = []string{""}
		}
	}
	return steps
}

// check sends the request of a step, and returns how the response differs.
func (c *client) check(s step, body string) (problem string) {
	c.t.Helper()
	resp := c.send(s.request, body, s.headers...)
	if s.want == nil {
		problem = "\nThe step has no response."
	}
	for _, line := range s.want {
		want, got := c.expand(line), resp.body
		if name, _, isHeader := strings.Cut(line, ":"); isHeader && line[0] == '<' {
			got = strings.TrimSpace(name + ": " + resp.Header.Get(name[2:]))
		} else if line[0] == '<' {
			got = fmt.Sprint("< ", resp.StatusCode)
		}
		if !c.match(want, got) {
			problem += fmt.Sprintf("\n got %s\nwant %s", got, want)
		}
	}
	if problem != "" {
		problem = fmt.Sprintf("%s %s%s\nThe response has the body %s", s.request, body, problem, resp.body)
	}
	return problem
}

// match compares a line with a wanted one, and keeps the values of new names.
func (c *client) match(want, got string) bool {
	pattern := regexp.MustCompile(`\\\$(\w+)`).ReplaceAllString(regexp.QuoteMeta(want), `(?P<$1>[^",}\s]+)`)
	re := regexp.MustCompile("^" + strings.ReplaceAll(pattern, "…", ".*") + "$")
	values := re.FindStringSubmatch(got)
	for n, name := range re.SubexpNames() {
		if values != nil && name != "" {
			c.names[name] = values[n]
		}
	}
	return values != nil
}

// expand replaces the names that have a value.
func (c *client) expand(s string) string {
	return os.Expand(s, func(name string) string { return cmp.Or(c.names[name], "$"+name) })
}

// pipes is a network in memory. In a synctest bubble, there must be no other.
type pipes chan net.Conn

func (p pipes) Close() error   { close(p); return nil }
func (p pipes) Addr() net.Addr { return &net.UnixAddr{} }

func (p pipes) Accept() (net.Conn, error) {
	if conn, open := <-p; open {
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (p pipes) dial() net.Conn {
	client, server := net.Pipe()
	p <- server
	return client
}
