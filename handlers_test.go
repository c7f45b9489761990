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
	"sync"
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
	played := 0
	for _, path := range must(filepath.Glob("testdata/exercises/*.txt")) {
		number, _, _ := strings.Cut(filepath.Base(path), "-")
		if *exercise != "" && *exercise != "none" && *exercise != number {
			continue
		}
		played++
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
	if played == 0 {
		t.Errorf("-exercise %s: there is no such transcript", *exercise)
	}
}

// TestTour plays the curl lines of the README's tour. Each response must be the
// one shown there, except for ids, times and tokens.
func TestTour(t *testing.T) {
	c := newClient(t, newTestServer(t))
	_, tour, _ := strings.Cut(strings.ReplaceAll(string(must(os.ReadFile("README.md"))), "\r", ""), "## A tour")
	_, tour, _ = strings.Cut(tour, "```sh\n")
	tour, _, _ = strings.Cut(tour, "```")
	varying := regexp.MustCompile(`"(jwt|refresh_token|id)":"[^"]*"|"created_at":\d+`)
	//                           NAME=$(   curl ARGUMENTS | sed …"MEMBER"…   # response
	lines := regexp.MustCompile(`(?:(\w+)=\$\()?curl (.*?)(?: \| .*"(\w+)".*)?\n(?:# (.*)\n)?`).FindAllStringSubmatch(tour, -1)
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

// Tables, with one line for each kind of request:
// allRoutes has a request for each route.
var allRoutes = []string{
	"POST /access-tokens/refresh", "POST /access-tokens", "DELETE /access-tokens", "GET /me", "POST /ideas",
	"DELETE /ideas/x", "GET /ideas", "PUT /ideas/x", "POST /users", "GET /.well-known/jwks.json", "GET /healthz",
}

const (
	withToken   = "X-Access-Token: $jwt" // see client.signUp
	anIdea      = `{"content":"a","impact":1,"ease":2,"confidence":3}`
	jacksLogin  = `{"email":"jack@test.com","password":"the-Secret-123"}`
	jacksSignUp = `{"email":"jack@test.com","name":"Jack","password":"the-Secret-123"}`
	emailTaken  = "409 there is a user with this e-mail already" // the fields are valid
	wrongLogin  = "400 wrong e-mail or password"
	noToken     = "401 you can not pass!"
)

func TestTokenHeaders(t *testing.T) {
	s := newTestServer(t)
	c := newClient(t, s)
	c.signUp()
	c.names["nobodys"] = must(s.tokens.sign(claims{UserID: parseSerial("zzzzzzzzz")}))
	for _, test := range [][]string{ // the response, and the headers
		{"200", "X-Access-Token: $jwt"},
		{"200", "x-access-token: $jwt"},
		{"200", "X-Access-Token: Bearer $jwt"},
		{"200", "Authorization: Bearer $jwt"},
		{"200", "authorization: bearer  $jwt"},
		{"200", "X-Access-Token: $jwt", "Authorization: Basic ignored"},
		{noToken},
		{noToken, "X-Access-Token: null"},
		{noToken, "X-Access-Token: [object Object]"},
		{noToken, "X-Access-Token: $jwt", "X-Access-Token: $jwt"},
		{noToken, "X-Access-Token: null", "Authorization: Bearer $jwt"},
		{noToken, "X-Access-Token: null", "X-Access-Token: null", "Authorization: Bearer $jwt"},
		{noToken, "Authorization: $jwt"},
		{noToken, "Authorization: Basic $jwt"},
		{noToken, "Authorization: Bearer $jwt", "Authorization: Bearer $jwt"},
		{noToken, "X-Access-Token: ${jwt}x"},
		{noToken, "X-Access-Token: $refresh"},
		{noToken, "X-Access-Token: $nobodys"}, // its user does not exist
	} {
		c.expect("GET /me", "", test[0], test[1:]...)
	}
	c.expect("POST /access-tokens/refresh", `{"refresh_token":"$refresh"}`, "200", "X-Access-Token: null", "Authorization: [object Object]")
}

// TestBodies tests how a body is read, before its fields are.
func TestBodies(t *testing.T) {
	const (
		asJSON    = "application/json"
		asForm    = "application/x-www-form-urlencoded"
		form      = "content=a+%26+b&impact=1&ease=2&confidence=3"
		cut       = `{"content":"a","impact":1,"ease":2,"confidence":3`
		notJSON   = "400 the body must be one JSON object, or a form"
		notForm   = "400 the form or query cannot be read"
		twice     = "400 something is given twice"
		otherType = "415 the Content-Type must be application/json or application/x-www-form-urlencoded"
	)
	c := newClient(t, newTestServer(t))
	c.signUp()
	for _, test := range []struct {
		contentType, want string
		bodies            []string
	}{
		{asJSON, "201", []string{anIdea, " \r\n\t" + anIdea + " \r\n\t"}},
		{"application/json; charset=utf-8", "201", []string{anIdea}},
		{"Application/JSON;anything", "201", []string{anIdea}},
		{"", "201", []string{anIdea}},
		{asForm, "201", []string{anIdea, "\n " + anIdea, form}},
		{asForm + "; charset=utf-8", "201", []string{form}},
		{"text/plain", otherType, []string{anIdea}},
		{"multipart/form-data; boundary=x", otherType, []string{anIdea}},
		{"application/jsonx", otherType, []string{anIdea}},
		{"application/xml", otherType, []string{"<content/>"}},

		{"", notJSON, []string{""}},
		{asJSON, notJSON, []string{"", form, "null", "[" + anIdea + "]", `"content"`, cut, anIdea + "x", anIdea + anIdea}},
		{asJSON, notJSON, []string{`{"content":'a'}`, `{"content":"a",}`, "{\"content\":\"a\xff\"}", strings.Repeat(`{"a":`, 10_000)}},
		{asForm, notJSON, []string{cut}},
		{asForm, notForm, []string{"content=%zz", "content=a;impact=1"}},

		{asJSON, twice, []string{cut + `,"content":"a"}`, cut + `,"\u0063ontent":"b"}`, cut + `,"x":1,"x":2}`, cut + `,"x":"} [ \"","x":"b"}`}},
		{asForm, twice, []string{form + "&impact=1"}},
		{asJSON, "201", []string{cut + `,"x":"\":: } { ] [ \\"}`, cut + `,"x":{"x":[{"x":1}]},"y":[{},{"x":2}]}`}},

		// Names are compared exactly.
		{asJSON, "422 content must be given", []string{`{"Content":"a","impact":1,"ease":2,"confidence":3}`}},
		{asForm, "422 content must be given", []string{"Content=a&impact=1&ease=2&confidence=3"}},
		{asForm, "201", []string{"content=a%22b%5Cc%0Ad%3Ce&impact=1&ease=2&confidence=3"}},
		{asForm, "422 content must not hold control characters or U+FFFD", []string{"content=a%ff&impact=1&ease=2&confidence=3"}},
		{asForm, "422 confidence must be given; content must be given; ease must be given; impact must be given", []string{""}},
	} {
		for _, body := range test.bodies {
			c.expect("POST /ideas", body, test.want, withToken, "Content-Type: "+test.contentType)
		}
	}
}

func TestBodyLimit(t *testing.T) {
	s := newTestServer(t)
	c := newClient(t, s)
	c.signUp()
	atLimit := anIdea + strings.Repeat(" ", 64<<10-len(anIdea))
	c.expect("POST /ideas", atLimit, "201", withToken)
	for _, route := range append(allRoutes, "POST /nowhere", "PATCH /me") {
		c.expect(route, atLimit+" ", "413 the body must be at most 64 KiB", withToken)
	}
	// A request without a Content-Length is rejected while it is read.
	r := httptest.NewRequest("POST", "/users", io.MultiReader(strings.NewReader(atLimit+" ")))
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	if w.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("64 KiB and a byte in chunks: got status %d, want 413", w.Code)
	}
}

// TestFields tests both sides of every rule for a field. The other fields of
// each request are valid.
func TestFields(t *testing.T) {
	const (
		weak     = "422 password must have at least 8 characters, among them an upper-case letter, a lower-case letter and a number"
		control  = "422 password must not hold control characters or U+FFFD"
		badEmail = "422 email must be an e-mail address"
		badToken = "400 the refresh token is unknown, expired or logged out"
		badScore = "422 impact must be an integer from 1 to 10"
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
		{"POST /users", "email", badEmail, []string{`"plain"`, `"@test.com"`, `"a@"`, `"a@b@test.com"`, `"a b@test.com"`}},
		{"POST /users", "email", badEmail, []string{`"a@test.com, b@test.com"`, `"<a@test.com>"`, `"A <a@test.com>"`, `"a@test.com (a)"`}},
		{"POST /users", "email", badEmail, []string{`"\"a\"@test.com"`, `"\"a b\"@test.com"`, `"a@[127.0.0.1]"`, `"a@te_st.com"`, `"a@test..com"`}},
		{"POST /users", "email", badEmail, []string{`"é@test.com"`, `"a@tést.com"`}},
		{"POST /users", "email", "201", []string{`"` + long("a", 250) + `@b.c"`}},
		{"POST /users", "email", "422 email must be 1 to 254 characters long", []string{`"` + long("a", 251) + `@b.c"`, `" "`}},

		{"POST /users", "name", emailTaken, []string{`" J "`, `"` + long("é", 255) + `"`}},
		{"POST /users", "name", "422 name must be 1 to 255 characters long", []string{`" "`, `"` + long("é", 256) + `"`}},
		{"POST /users", "name", "422 name must not hold control characters or U+FFFD", []string{`"a\u0000b"`}},

		{"POST /users", "password", emailTaken, []string{`"aB3aB3aB"`, `"éÉ3éÉ3éÉ"`, `"aB3` + long("x", 1021) + `"`, `"aB3 \t\n aB3"`}},
		{"POST /users", "password", weak, []string{`"aB3aB3a"`, `"éÉ3éÉ3é"`, `"ab3ab3ab"`, `"AB3AB3AB"`, `"aBcaBcaB"`}},
		{"POST /users", "password", "422 password must be 1 to 1024 bytes long", []string{`"aB3` + long("x", 1022) + `"`}},
		{"POST /users", "password", control, []string{`"aB3aB3aB\ud800"`, `"aB3aB3aB\ufffd"`, `"aB3aB3aB\u001b"`}},

		{"POST /access-tokens", "email", wrongLogin, []string{`"nobody"`, `"nobody@test.com"`}},
		{"POST /access-tokens", "password", wrongLogin, []string{`"short"`}},
		{"POST /access-tokens", "password", control, []string{`"\ufffd"`}},
		{"POST /access-tokens/refresh", "refresh_token", badToken, []string{`"x"`, `"` + long("x", 60_000) + `"`}},
		{"POST /access-tokens/refresh", "refresh_token", "422 refresh_token must be text", []string{`null`}},

		{"POST /ideas", "content", "201", []string{`" \u0061\n\tb "`, `"` + long("😀", 255) + `"`, `"  ` + long("a", 255) + `  "`}},
		{"POST /ideas", "content", "422 content must be 1 to 255 characters long", []string{`"` + long("😀", 256) + `"`, `" \t\r\n\u00a0"`}},
		{"POST /ideas", "content", "422 content must not hold control characters or U+FFFD", []string{`"a\rb"`, `"a\u007fb"`, `"a\u0085b"`, `"\udc00"`}},
		{"POST /ideas", "content", "422 content must be text", []string{`7`, `{"a":1}`}},

		{"POST /ideas", "impact", "201", []string{`1`, `10`, `"1"`, `"10"`, `"\u0038"`}},
		{"POST /ideas", "impact", badScore, []string{`0`, `11`, `-1`, `-0`, `8.5`, `8.0`, `1e1`, `18446744073709551617`}},
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
	for _, query := range []string{"", "?", "?page=1", "?page=03", "?page=1&x=%zz", "?page=1&x=1&x=2", "?page=9223372036854775807"} {
		c.expect("GET /ideas"+query, "", "200", withToken)
	}
	for page := range strings.FieldsSeq("0 -1 1.0 one %201 %2B1 1e1 0x1 18446744073709551616 9223372036854775808 %zz 1; 1&page=2 &x=1") {
		c.expect("GET /ideas?page="+page, "", "422 page must be an integer above 0", withToken)
	}
}

// TestList lists two ideas for each sum of three scores. The highest average comes
// first, and of two equal ones the newer. An average is the shortest form of the
// float64, always with a decimal point.
func TestList(t *testing.T) {
	averages := strings.Fields(`
		1.0 1.3333333333333333 1.6666666666666667 2.0 2.3333333333333335 2.6666666666666665
		3.0 3.3333333333333335 3.6666666666666665 4.0 4.333333333333333 4.666666666666667
		5.0 5.333333333333333 5.666666666666667 6.0 6.333333333333333 6.666666666666667
		7.0 7.333333333333333 7.666666666666667 8.0 8.333333333333334 8.666666666666666
		9.0 9.333333333333334 9.666666666666666 10.0`)
	c := newClient(t, newTestServer(t))
	c.signUp()
	var want, got []string
	for n := range 2 * len(averages) {
		sum := 3 + n*5%len(averages)
		idea := fmt.Sprintf(`{"content":"%s","impact":%d,"ease":%d,"confidence":%d}`,
			strings.Repeat("long", 60), min(10, sum-2), max(1, min(10, sum-11)), max(1, sum-20))
		id := member(c.send("POST /ideas", idea, withToken).body, "id")
		want = append(want, fmt.Sprintf("%02d %s %s", sum, id, averages[sum-3]))
	}
	slices.Sort(want)
	slices.Reverse(want)
	for page := range 6 {
		list := c.send(fmt.Sprintf("GET /ideas?page=%d", page+1), "", withToken).body
		for _, idea := range regexp.MustCompile(`"id":"(\w+)".*?"average_score":([\d.]+)`).FindAllStringSubmatch(list, -1) {
			got = append(got, idea[1]+" "+idea[2])
			if n := len(got) - 1; n < len(want) && got[n] != want[n][3:] {
				t.Errorf("idea %d of the list: got %s, want %s", n+1, got[n], want[n][3:])
			}
		}
	}
	if len(got) != len(want) {
		t.Errorf("got %d ideas, want %d", len(got), len(want))
	}
}

func TestPreflight(t *testing.T) {
	c := newClient(t, newTestServer(t))
	for _, route := range append(allRoutes, "GET /nowhere", "GET /", "GET //ideas/") {
		_, path, _ := strings.Cut(route, " ")
		c.expect("OPTIONS "+path, "", "204", "Origin: https://example.org", "Access-Control-Request-Method: POST")
	}
}

// TestFullDisk makes changes while the disk is full. They have no effect.
func TestFullDisk(t *testing.T) {
	s := newTestServer(t)
	var full atomic.Bool
	var written atomic.Int64
	weigh := weigh(&written)
	s.store = mustStart(t, scratch(t), func(op, path string, do func() error) error {
		before := written.Load()
		if err := weigh(op, path, do); err != nil || !full.Load() || written.Load()-before < 30 {
			return err
		}
		return syscall.ENOSPC // a line of 30 bytes still fits
	})
	c := newClient(t, s)
	c.signUp()
	const notStored = "503 nothing can be stored just now; try again in a moment"
	full.Store(true)
	for _, test := range []struct{ request, body, want string }{
		{"POST /ideas", anIdea, notStored},
		{"POST /users", `{"email":"jill@test.com","name":"Jill","password":"the-Secret-123"}`, notStored},
		{"POST /access-tokens", jacksLogin, notStored},
		{"DELETE /access-tokens", `{"refresh_token":"$refresh"}`, notStored},
		{"GET /healthz", "", notStored},
		{"POST /users", jacksSignUp, emailTaken}, // such changes do not get as far as the disk
		{"PUT /ideas/000000000", anIdea, "404 you have no such idea"},
		{"DELETE /ideas/000000000", "", "404 you have no such idea"},
	} {
		c.expect(test.request, test.body, test.want, withToken)
	}
	if list := c.send("GET /ideas", "", withToken).body; list != "[]" {
		t.Errorf("got the list %s, want []", list)
	}
	full.Store(false)
	c.expect("GET /healthz", "", "200")
	before := written.Load()
	c.expect("GET /healthz", "", "200")
	if written.Load() != before {
		t.Error("GET /healthz of a healthy server writes to the disk")
	}
	c.expect("POST /access-tokens/refresh", `{"refresh_token":"$refresh"}`, "200")
	c.expect("POST /ideas", anIdea, "201", withToken)
}

// Logins under attack and under load:

// TestThrottling tests who has to wait after ten failed logins: all who try the
// same e-mail from the same address, and nobody else. For how long is in
// testdata/api/throttling.txt.
func TestThrottling(t *testing.T) {
	const (
		right, wrong = "the-Secret-123", "a wrong one"
		throttled    = "429 too many failed log-ins; try again in 30 seconds"
	)
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		c := newClient(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.RemoteAddr = r.Header.Get("From")
			s.ServeHTTP(w, r)
		}))
		c.signUp()
		logIn := func(from, email, password, want string) {
			t.Helper()
			body := fmt.Sprintf(`{"email":%q,"password":%q}`, email, password)
			c.expect("POST /access-tokens", body, want, "From: "+from, "X-Forwarded-For: 192.0.2.9") // which says nothing
		}
		for _, email := range []string{"jack@test.com", "nobody@test.com"} {
			for range 9 {
				logIn("192.0.2.1:1", email, wrong, wrongLogin)
			}
			logIn("192.0.2.1:2", strings.ToUpper(email), wrong, wrongLogin)
			logIn("192.0.2.1:3", email, right, throttled)
			logIn("192.0.2.1:4", email, wrong, throttled)
		}
		logIn("192.0.2.2:1", "jack@test.com", right, "201")
		logIn("192.0.2.1:1", "jill@test.com", wrong, wrongLogin)

		// In IPv6, the clients of a /64 count as one.
		for n := range 10 {
			logIn(fmt.Sprintf("[2001:db8::%d]:1", n), "jack@test.com", wrong, wrongLogin)
		}
		logIn("[2001:db8::ffff]:1", "jack@test.com", right, throttled)
		logIn("[2001:db8:0:1::1]:1", "jack@test.com", right, "201")
	})
}

// TestConcurrentAttempts makes 30 attempts at once. None slips through, except
// for those that are being checked next to the tenth failure.
func TestConcurrentAttempts(t *testing.T) {
	for _, slots := range []int{1, 4} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.hashing = newGate(slots, 100)
			c := newClient(t, s)
			for _, burst := range []struct{ least, most, wait int }{{10, 9 + slots, 30}, {1, 1, 60}, {1, 1, 120}} {
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
		})
	}
}

// TestConcurrentLogins logs in with many devices. With the right password they
// do not throttle each other.
func TestConcurrentLogins(t *testing.T) {
	s := newTestServer(t)
	s.hashing = newGate(14, 0)
	c := newClient(t, s)
	c.signUp()
	atOnce(14, func(int) { c.expect("POST /access-tokens", jacksLogin, "201") })
}

func TestThrottleIsBounded(t *testing.T) {
	g := guesses{made: make(map[guesser]failures)}
	for n := range 100_001 {
		g.end(guesser{email: strconv.Itoa(n)}, false)
	}
	if len(g.made) > 50_000 {
		t.Errorf("%d attempts are remembered, want at most 50,000", len(g.made))
	}
}

// TestUnknownEmail makes sure that an unknown e-mail cannot be told from a wrong
// password: the response is the same, and so is the hash that is computed. Its
// memory shows that it is.
func TestUnknownEmail(t *testing.T) {
	s := newTestServer(t)
	c := newClient(t, s)
	c.signUp()
	logIn := func(email string) string {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		resp := c.send("POST /access-tokens", fmt.Sprintf(`{"email":%q,"password":"a wrong one"}`, email))
		runtime.ReadMemStats(&after)
		if hashes := float64(after.TotalAlloc-before.TotalAlloc) / (argonMemory << 10); hashes < 1 || hashes > 1.5 {
			t.Errorf("%s: the login takes the memory of %.2f hashes, want that of one", email, hashes)
		}
		resp.Header.Del("Date")
		resp.Header.Del("X-Request-Id")
		return fmt.Sprint(resp.StatusCode, resp.Header, resp.body)
	}
	if known, unknown := logIn("jack@test.com"), logIn("nobody@test.com"); known != unknown {
		t.Errorf("a known e-mail gets\n%s\nan unknown e-mail\n%s", known, unknown)
	}
	u, _ := s.store.userByEmail("jack@test.com")
	if cost := regexp.MustCompile(`^\$argon2id\$v=19\$m=19456,t=2,p=1\$`); !cost.MatchString(u.Password) || !cost.MatchString(noPassword) {
		t.Errorf("got the costs of %s and %s, want m=19456,t=2,p=1", u.Password, noPassword)
	}
}

// TestGate tests the limit of concurrent hashes: two are computed at a time, three
// callers wait for at most 5 seconds, and the others are rejected at once.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, start := newGate(2, 3), time.Now()
		var mu sync.Mutex
		var got []string
		work := func() error { time.Sleep(3 * time.Second); return nil }
		atOnce(8, func(int) {
			err := g.do(t.Context(), work)
			mu.Lock()
			defer mu.Unlock()
			got = append(got, fmt.Sprint(time.Since(start), errors.Is(err, errBusy)))
		})
		want := []string{"0s true", "0s true", "0s true", "3s false", "3s false", "5s true", "6s false", "6s false"}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("got (when, busy) %q, want %q", got, want)
		}
		gone, leave := context.WithCancel(t.Context())
		leave()
		go g.do(t.Context(), work)
		go g.do(t.Context(), work)
		synctest.Wait()
		if err := g.do(gone, work); !errors.Is(err, errBusy) {
			t.Errorf("for a client that has gone: got %v, want errBusy", err)
		}
		time.Sleep(3 * time.Second) // until the others are done
	})
}

// TestLoginStorm logs in 40 times while a hash takes longer than anybody waits.
func TestLoginStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.hashing = newGate(1, 5)
		c := newClient(t, s)
		c.signUp()
		go s.hashing.do(t.Context(), func() error { time.Sleep(10 * time.Second); return nil })
		synctest.Wait()
		atOnce(40, func(int) {
			c.expect("POST /access-tokens", jacksLogin, "503 too many people are logging in just now; try again in a moment")
		})
		time.Sleep(5 * time.Second)
		c.expect("POST /access-tokens", jacksLogin, "201")
	})
}

// Connections, panics and the log:

// TestSlowClients sends a byte now and then. Such clients are disconnected, and
// block nobody. In the bubble of synctest, the network is a pipe.
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

// TestShutdown stops the server during a request, which has 10 seconds to end.
func TestShutdown(t *testing.T) {
	for takes, want := range map[time.Duration]time.Duration{9 * time.Second: 9 * time.Second, 20 * time.Second: 10 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer(t)
			s.public("GET /slow", func(w http.ResponseWriter, r *http.Request) error {
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

// startServing runs serve on a pipe network. The returned stop ends it and waits.
func startServing(t *testing.T, s *server) (network pipes, stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	network = make(pipes)
	done := make(chan error)
	go func() { done <- serve(ctx, s, network) }()
	t.Cleanup(func() { time.Sleep(time.Minute) }) // until handlers and clients have noticed
	return network, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestPanic(t *testing.T) {
	var log bytes.Buffer
	s := newTestServer(t)
	s.log = newLogger(&log, true)
	s.public("GET /panic", func(http.ResponseWriter, *http.Request) error { panic("a secret") })
	s.public("GET /late", func(w http.ResponseWriter, _ *http.Request) error {
		writeJSON(w, http.StatusOK, "done")
		panic("a secret")
	})
	c := newClient(t, s)
	c.expect("GET /panic", "", "500 something went wrong on our side")
	if got := c.send("GET /late", ""); got.StatusCode != http.StatusOK || got.body != `"done"` {
		t.Errorf("GET /late: got %d %s, want the response as it was before the panic", got.StatusCode, got.body)
	}
	c.expect("GET /healthz", "", "200")
	if got := log.String(); strings.Count(got, "level=ERROR") != 2 || strings.Count(got, "\n") != 2 || !strings.Contains(got, "a secret") || !strings.Contains(got, "handlers_test.go") {
		t.Errorf("got the log\n%s\nwant two lines, each with a panic and its place", got)
	}
}

// TestLog tests that there is one line for each request, that no input can forge
// one, and that there are no secrets.
func TestLog(t *testing.T) {
	var log bytes.Buffer
	s := newTestServer(t)
	s.log = newLogger(&log, false)
	c := newClient(t, s)
	c.signUp()
	c.expect("DELETE /access-tokens?refresh_token=$refresh", "", "204", withToken)
	c.expect("POST /access-tokens", `{"email":"jack@test.com","password":"the-Secret-124"}`, wrongLogin)
	c.expect(`GET /a%0aevil=1%20"b"%1b[31m?secret=the-Secret-123`, "", "404 there is nothing here")
	want := []string{
		`level=INFO msg=request method=POST path=/users status=201 duration=\S+ id=\w+-1`,
		`level=INFO msg=request method=DELETE path=/access-tokens status=204 duration=\S+ id=\w+-2`,
		`level=WARN msg=request method=POST path=/access-tokens status=400 duration=\S+ id=\w+-3 error="wrong e-mail or password"`,
		`level=INFO msg=request method=GET path="/a\\nevil=1 \\"b\\"\\x1b\[31m" status=404 duration=\S+ id=\w+-4`,
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
	s.log = newLogger(&log, true)
	c.expect("GET /healthz", "", "200")
	c.expect("GET /nowhere", "", "404 there is nothing here")
	c.expect("POST /access-tokens", `{"email":"jack@test.com","password":"the-Secret-124"}`, wrongLogin)
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "status=400") {
		t.Errorf("got the quiet log\n%s\nwant the failed login only", got)
	}
}

// The command:

// startCommand runs the command, without the shell around it. The returned stop
// ends it, and returns all that it has printed.
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

// TestCommand starts the command in an empty directory, and again.
func TestCommand(t *testing.T) {
	t.Chdir(t.TempDir())
	c, stop := startCommand(t)
	c.signUp()
	for impact := range 3 {
		c.expect("POST /ideas", fmt.Sprintf(`{"content":"a","impact":%d,"ease":1,"confidence":1}`, impact+1), "201", withToken)
	}
	before := c.send("GET /ideas", "", withToken).body
	want := regexp.MustCompile(`^Idea Pool is at (http://127\.0\.0\.1:\d+)
  data: ideapool.json
  key:  ideapool.pem
Try it:
  curl http://127\.0\.0\.1:\d+/users -d email=me@example.org -d name=Me -d password=the-Secret-123
(?s:.*)\nIdea Pool has stopped.
$`)
	if output := stop(); !want.MatchString(output) {
		t.Errorf("got the output\n%s\nwant\n%s", output, want)
	}
	for _, file := range must(os.ReadDir(".")) {
		for _, secret := range []string{"the-Secret", c.names["jwt"], c.names["refresh"]} {
			if bytes.Contains(must(os.ReadFile(file.Name())), []byte(secret)) {
				t.Errorf("%s contains %s", file.Name(), secret)
			}
		}
	}
	names := c.names
	c, stop = startCommand(t, "-quiet")
	c.names = names
	if after := c.send("GET /ideas", "", withToken).body; after != before || strings.Count(after, "content") != 3 {
		t.Errorf("after a restart, got the list\n%s\nwant\n%s", after, before)
	}
	c.expect("POST /access-tokens/refresh", `{"refresh_token":"$refresh"}`, "200")
	c.expect("POST /access-tokens", jacksLogin, "201")
	stop()
}

// TestCommandInMemory starts the command without a data file. It still makes a
// key, and warns when others can read it. Headers are limited to 16 KiB.
func TestCommandInMemory(t *testing.T) {
	t.Chdir(t.TempDir())
	_, stop := startCommand(t, "-data", "")
	stop()
	os.Chmod("ideapool.pem", 0o644)
	c, stop := startCommand(t, "-data", "")
	c.signUp()
	for size, want := range map[int]int{15 << 10: 401, 17 << 10: 431} {
		r := must(http.NewRequest("GET", c.url+"/me", nil))
		r.Header.Set("X", strings.Repeat("x", size))
		resp := must(c.transport.RoundTrip(r))
		if resp.Body.Close(); resp.StatusCode != want {
			t.Errorf("a header of %d bytes: got status %d, want %d", size, resp.StatusCode, want)
		}
	}
	if output := stop(); runtime.GOOS != "windows" && !regexp.MustCompile("level=WARN .*ideapool.pem").MatchString(output) {
		t.Errorf("got the output\n%s\nwant a warning about the key", output)
	}
	if files := must(os.ReadDir(".")); len(files) != 1 || files[0].Name() != "ideapool.pem" {
		t.Errorf("got the files %v, want ideapool.pem", files)
	}
}

// TestBadStarts tests that an error at the start is one line that names the flag
// or the file, and that no file is changed.
func TestBadStarts(t *testing.T) {
	busy := must(net.Listen("tcp", "localhost:0"))
	defer busy.Close()
	t.Chdir(t.TempDir())
	os.Mkdir("directory", 0o700)
	os.WriteFile("garbage", []byte("garbage"), 0o600)
	before := readDirectory()
	stopped, stop := context.WithCancel(t.Context()) // if it starts, it stops at once
	stop()
	const badOrigin = `invalid value ".*" for flag -cors-origin: must be '[*]', none, or an origin such as https://example.org`
	for _, test := range []struct{ args, want string }{
		{"-nope", "flag provided but not defined: -nope"},
		{"-access-ttl ten", `invalid value "ten" for flag -access-ttl: time: invalid duration "ten"`},
		{"-access-ttl 999ms", `invalid value "999ms" for flag -access-ttl: must be 1s or more`},
		{"-refresh-ttl -1h", `invalid value "-1h" for flag -refresh-ttl: must be 1s or more`},
		{"-cors-origin example.org", badOrigin},
		{"-cors-origin https://Example.org", badOrigin},
		{"-cors-origin https://example.org/", badOrigin},
		{"serve", `unexpected argument "serve"`},
		{"-key " + must(filepath.Abs("ideas")) + " -data ideas", "flag -key needs a file of its own"},
		{"-key= -data ideas", "flag -key needs a file of its own"},

		{"-addr " + busy.Addr().String(), "-addr " + busy.Addr().String() + ": listen tcp .*"},
		{"-addr nonsense", "-addr nonsense: .* missing port"},
		{"-key garbage", "-key garbage: is not PEM"},
		{"-key directory", "-key directory: "},
		{"-key missing/key.pem", "-key missing/key.pem: "},
		{"-data garbage", "-data garbage: .*garbage: is damaged"},
		{"-data directory", "-data directory: "},
		{"-data missing/data", "-data missing/data: "},
	} {
		var stderr bytes.Buffer
		defaults := []string{"-addr", "localhost:0", "-data", "", "-key", "unused.pem"}
		err := run(stopped, append(defaults, strings.Fields(test.args)...), &stderr)
		isUsage := errors.Is(err, errUsage)
		line, help, _ := strings.Cut(stderr.String(), "\n")
		if !isUsage {
			line, help = fmt.Sprint(err), usage
		}
		if !regexp.MustCompile("^"+test.want+".*$").MatchString(line) || isUsage == strings.HasPrefix(test.want, "-") || help != usage {
			t.Errorf("%s: got %v and\n%s\nwant\n%s", test.args, err, &stderr, test.want)
		}
		if after := readDirectory(); !maps.Equal(after, before) {
			t.Errorf("%s: got the files %v, want %v", test.args, after, before)
		}
	}
}

// readDirectory returns the files in the working directory, other than locks.
func readDirectory() map[string]string {
	files := make(map[string]string)
	for _, file := range must(os.ReadDir(".")) {
		if data, _ := os.ReadFile(file.Name()); filepath.Ext(file.Name()) != ".lock" {
			files[file.Name()] = string(data) // empty for a directory
		}
	}
	return files
}

func TestUsage(t *testing.T) {
	var stderr bytes.Buffer
	if err := run(t.Context(), []string{"-h"}, &stderr); !errors.Is(err, flag.ErrHelp) || stderr.String() != usage {
		t.Errorf("-h: got %v and\n%s\nwant the usage", err, &stderr)
	}
	for argument, want := range map[string]int{"-h": 0, "-nope": 2} {
		command := exec.Command(os.Args[0], argument)
		command.Env = append(os.Environ(), serveEnv+"=1")
		if command.Run(); command.ProcessState.ExitCode() != want {
			t.Errorf("%s: got %v, want %d", argument, command.ProcessState, want)
		}
	}
	if lines := regexp.MustCompile(`(?m)^.{0,80}$`).FindAllString(usage, -1); len(lines) != strings.Count(usage, "\n")+1 || len(lines) > 24 {
		t.Errorf("the usage does not fit on a screen:\n%s", usage)
	}
	got, err := parseFlags(nil, io.Discard)
	if want := (options{"localhost:8080", "ideapool.json", "ideapool.pem", 10 * time.Minute, 720 * time.Hour, "*", false}); err != nil || got != want {
		t.Errorf("without flags: got %+v, want %+v", got, want)
	}
}

// Fuzzing and benchmarks:

// FuzzRequest tests that no method, path, body or header leads to a 5xx, a
// redirect, or a response that is unlike the others.
func FuzzRequest(f *testing.F) {
	for _, route := range allRoutes {
		method, path, _ := strings.Cut(route, " ")
		f.Add(method, path, "application/json", `{"content":"a","impact":"8","ease":9,"confidence":10}`)
		f.Add(method, path+"?page=2", "application/x-www-form-urlencoded", "refresh_token=a%00&email=a%40b.c")
	}
	f.Add("CONNECT", "/ideas/../me", "", "[]")
	f.Add("GET", "*", "", "")
	s := newTestServer(f)
	c := newClient(f, s)
	c.signUp()
	token := c.names["jwt"]
	id := must(s.tokens.verify(token)).UserID
	s.hashing = newGate(0, 0) // hashes take too long here
	f.Fuzz(func(t *testing.T, method, path, contentType, body string) {
		u, err := url.ParseRequestURI(path)
		if err != nil || !regexp.MustCompile("^[A-Z]+$").MatchString(method) {
			t.Skip()
		}
		if _, err := s.tokens.verify(token); err != nil { // it was logged out
			token = must(s.tokens.sign(claims{UserID: id}))
		}
		for _, token := range []string{"", token} {
			c := &client{t: t, origin: "*"}
			header := http.Header{"Content-Type": {contentType}, "X-Access-Token": {token}}
			r := &http.Request{Method: method, URL: u, Body: io.NopCloser(strings.NewReader(body)), Header: header}
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			if resp := c.read(r, w.Result()); resp.StatusCode >= 500 && resp.StatusCode != 503 || resp.StatusCode/100 == 3 {
				t.Errorf("%s %s: got %s", method, path, resp.Status)
			}
		}
	})
}

// FuzzText tests that text is trimmed, and otherwise rejected or not changed.
func FuzzText(f *testing.F) {
	for _, s := range []string{"a", " é\n", "\u0000", "\ufffd", "<&>", "\u2028", "a\xff", `"\`, "\u00a0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		bodies := map[string]string{
			"application/json":                  `{"content":` + string(must(json.Marshal(s))) + `}`,
			"application/x-www-form-urlencoded": url.Values{"content": {s}}.Encode(),
		}
		for contentType, body := range bodies {
			r := httptest.NewRequest("POST", "/ideas", strings.NewReader(body))
			r.Header.Set("Content-Type", contentType)
			in := readInput(r)
			if got := in.text("content", 255); in.err() == nil && got != strings.TrimSpace(s) {
				t.Errorf("%s: got %q, want %q", contentType, got, s)
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
		b.Run(request+"/bare", func(b *testing.B) { benchmark(b, bare, r) })
		b.Run(request+"/ours", func(b *testing.B) { benchmark(b, s, r) })
	}
}

func benchmark(b *testing.B, h http.Handler, r *http.Request) {
	w, body := discardWriter{make(http.Header)}, strings.NewReader("")
	b.ReportAllocs()
	for b.Loop() {
		if r.Method == "POST" || r.Method == "PUT" {
			body.Reset(anIdea)
			r.Body, r.ContentLength = io.NopCloser(body), int64(len(anIdea))
		}
		clear(w.header)
		h.ServeHTTP(w, r)
	}
}

// A discardWriter is a minimal ResponseWriter.
type discardWriter struct{ header http.Header }

func (w discardWriter) Header() http.Header         { return w.header }
func (w discardWriter) WriteHeader(int)             {}
func (w discardWriter) Write(p []byte) (int, error) { return len(p), nil }

// Helpers. Others (must, member, atOnce, mustStart, scratch, quiet, rfcKey) are
// in the other test files.

// newTestServer returns a server that keeps everything in memory and signs with
// rfcKey, unless the flags of the command say otherwise.
func newTestServer(t testing.TB, flags ...string) *server {
	o := must(parseFlags(append([]string{"-data="}, flags...), io.Discard))
	key := rfcKey()
	if o.key != "ideapool.pem" {
		key = must(readKey(o.key))
	}
	store := must(openStore(o.data, quiet))
	if err := store.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.close() })
	return newServer(o, key, store, quiet)
}

// A client sends requests to a server.
type client struct {
	t         testing.TB
	url       string
	transport http.RoundTripper
	origin    string            // of Access-Control-Allow-Origin in every response
	names     map[string]string // what $name stands for
}

// newClient returns a client of a handler behind a network in memory.
func newClient(t testing.TB, h http.Handler) *client {
	network, server := make(pipes), &http.Server{Handler: h}
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

// send sends a request, such as "GET /me", with headers such as "Name: value".
func (c *client) send(request, body string, headers ...string) testResponse {
	c.t.Helper()
	method, target, _ := strings.Cut(c.expand(request), " ")
	r := must(http.NewRequest(method, c.url+target, strings.NewReader(c.expand(body))))
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

// expect sends a request, and wants "201", or "404 you have no such idea".
func (c *client) expect(request, body, want string, headers ...string) {
	c.t.Helper()
	resp := c.send(request, body, headers...)
	if got := strings.TrimSpace(fmt.Sprint(resp.StatusCode, " ", resp.reason)); got != want {
		c.t.Errorf("%s %q\n%.100s\n got %s\nwant %s", request, headers, body, got, want)
	}
}

// play plays the transcript in a file, and returns the first step that fails. It
// must be called in a bubble of synctest.
func play(t *testing.T, path string) (step, error) {
	time.Sleep(time.Until(time.Unix(1553657927, 0)))
	c, repeat := newClient(t, newTestServer(t)), 1
	c.names["dir"] = t.TempDir()
	for _, step := range readTranscript(path) {
		switch {
		case step.command == nil:
			for range repeat {
				if problem := c.check(step); problem != "" {
					return step, fmt.Errorf("%s:%d: %s", path, step.line, problem)
				}
			}
			repeat = 1
		case step.command[0] == "ideapool":
			dir := t.TempDir() // with the files as a kill would leave them
			c.names["dir"] = must(dir, os.CopyFS(dir, os.DirFS(c.names["dir"])))
			flags := step.command[1:]
			for n := range flags {
				flags[n] = c.expand(flags[n])
			}
			c.transport, c.origin = newClient(t, newTestServer(t, flags...)).transport, "*"
			if i := slices.Index(flags, "-cors-origin"); i >= 0 {
				c.origin = strings.Replace(flags[i+1], "none", "", 1)
			}
		case step.command[0] == "sleep":
			time.Sleep(must(time.ParseDuration(step.command[1])))
		case step.command[0] == "repeat":
			repeat = must(strconv.Atoi(step.command[1]))
		}
	}
	return step{}, nil
}

// A step of a transcript is a request and the lines of its response, or a command.
type step struct {
	line          int
	marked        bool // see TestExercise
	command       []string
	request, body string
	headers, want []string
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
			steps = append(steps, step{line: n + 1, command: strings.Fields(command)})
		case isSent && strings.Contains(sent, " /"):
			steps = append(steps, step{line: n + 1, marked: marked, request: sent})
			marked = false
		case isSent:
			steps[last].headers = append(steps[last].headers, sent)
		case line[0] == '<', steps[last].want != nil:
			steps[last].want = append(steps[last].want, line)
		default:
			steps[last].body = line
			if !slices.ContainsFunc(steps[last].headers, func(h string) bool { return strings.HasPrefix(h, "Content-Type:") }) {
				steps[last].headers = append(steps[last].headers, "Content-Type: application/json")
			}
		}
	}
	return steps
}

// check sends the request of a step, and returns how the response differs.
func (c *client) check(s step) (problem string) {
	c.t.Helper()
	resp := c.send(s.request, s.body, s.headers...)
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
		problem = s.request + problem + "\nThe response has the body " + resp.body
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

// pipes is a network in memory. In a bubble of synctest, there must be no other.
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

var isID = regexp.MustCompile(`^[0-9a-z]{9}$`)

type load struct{} // this and loadEnv are gone as soon as TestMain in store_test.go does not name them

const loadEnv = ""

func (load) run() {}
