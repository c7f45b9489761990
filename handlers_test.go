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

// This is the API document, and it can be run. First come transcripts, in the
// manner of curl -v:
//
//	> POST /ideas              a request
//	> X-Access-Token: $jwt     its headers
//	{"content":"a"}            its body, and with it Content-Type: application/json
//	< 201                      the status that must come back,
//	< Content-Length: 121      a header (none, where nothing is given)
//	{"id":"$id"}               and the body, to the byte (any, where nothing is given)
//
// $name stands for what was there when the name first came. # is a comment.
//
// Then there are tables, with one line for each bad request, then guesses,
// storms, slow clients and the command itself, then fuzzing and benchmarks. The
// helpers are at the end.

// Transcripts:

// The examples of the API document, in its order. With a key of 4096 bits all
// its Content-Lengths come out.
func TestDocument(t *testing.T) {
	s := newTestServer()
	s.tokens = newTokens(must(readKey("testdata/rsa4096.pem")), 10*time.Minute)
	c := newClient(t, s)
	c.play(`
		# Refresh JWT
		> POST /users
		{"email":"email-3@test.com","name":"name-3","password":"the-Secret-123"}
		< 201
		{"jwt":"$jwt","refresh_token":"$the_token_str_2"}
		> POST /access-tokens/refresh
		{"refresh_token":"$the_token_str_2"}
		< 200
		< Content-Type: application/json; charset=utf-8
		< Content-Length: 835
		{"jwt":"$refreshed"}

		# User login
		> POST /users
		{"email":"email-1@test.com","name":"name-1","password":"the-Secret-123"}
		< 201
		{"jwt":"$jwt_1","refresh_token":"$token_1"}
		> POST /access-tokens
		{"email":"email-1@test.com","password":"the-Secret-123"}
		< 201
		< Content-Type: application/json; charset=utf-8
		< Content-Length: 954
		{"jwt":"$logged_in","refresh_token":"$the_token_str_1"}

		# User logout
		> DELETE /access-tokens
		> X-Access-Token: $logged_in
		{"refresh_token":"$the_token_str_1"}
		< 204
		< Content-Type:
		< X-Frame-Options: SAMEORIGIN
		< X-Content-Type-Options: nosniff

		# Current User
		> POST /users
		{"email":"email-4@test.com","name":"name-4","password":"the-Secret-123"}
		< 201
		{"jwt":"$jwt_4","refresh_token":"$token_4"}
		> GET /me
		> X-Access-Token: $jwt_4
		< 200
		< Content-Type: application/json; charset=utf-8
		< Content-Length: 140
		{"email":"email-4@test.com","name":"name-4","avatar_url":"https://www.gravatar.com/avatar/b36aafe03e05a85031fd8c411b69f792?d=mm\u0026s=200"}

		# Create idea
		> POST /ideas
		> X-Access-Token: $jwt
		{"content":"the-content","impact":8,"ease":8,"confidence":8}
		< 201
		< Content-Type: application/json; charset=utf-8
		< Content-Length: 121
		{"id":"$idea","content":"the-content","impact":8,"ease":8,"confidence":8,"average_score":8.0,"created_at":$created}

		# Delete idea
		> DELETE /ideas/$idea
		> X-Access-Token: $jwt
		< 204
		< Content-Type:

		# Get a page of ideas (1 page = 10 ideas)
		> POST /ideas
		> X-Access-Token: $jwt
		{"content":"the-content","impact":1,"ease":8,"confidence":8}
		< 201
		{"id":"$id_1","content":"the-content","impact":1,"ease":8,"confidence":8,"average_score":5.666666666666667,"created_at":$time_1}
		> POST /ideas
		> X-Access-Token: $jwt
		{"content":"the-content","impact":2,"ease":8,"confidence":8}
		< 201
		{"id":"$id_2","content":"the-content","impact":2,"ease":8,"confidence":8,"average_score":6.0,"created_at":$time_2}
		> POST /ideas
		> X-Access-Token: $jwt
		{"content":"the-content","impact":3,"ease":8,"confidence":8}
		< 201
		{"id":"$id_3","content":"the-content","impact":3,"ease":8,"confidence":8,"average_score":6.333333333333333,"created_at":$time_3}
		> GET /ideas?page=1
		> X-Access-Token: $jwt
		< 200
		< Content-Type: application/json; charset=utf-8
		< Content-Length: 395
		[{"id":"$id_3","content":"the-content","impact":3,"ease":8,"confidence":8,"average_score":6.333333333333333,"created_at":$time_3},{"id":"$id_2","content":"the-content","impact":2,"ease":8,"confidence":8,"average_score":6.0,"created_at":$time_2},{"id":"$id_1","content":"the-content","impact":1,"ease":8,"confidence":8,"average_score":5.666666666666667,"created_at":$time_1}]

		# Update idea
		> PUT /ideas/$id_1
		> X-Access-Token: $jwt
		{"content":"the-content","impact":8,"ease":8,"confidence":8}
		< 200
		< Content-Type: application/json; charset=utf-8
		< Content-Length: 121
		{"id":"$id_1","content":"the-content","impact":8,"ease":8,"confidence":8,"average_score":8.0,"created_at":$time_1}

		# Signup
		> POST /users
		{"email":"jack-black@codementor.io","name":"Jack Black","password":"the-Secret-123"}
		< 201
		< Content-Type: application/json; charset=utf-8
		< Content-Length: 970
		{"jwt":"$jack","refresh_token":"$jack_token"}
	`)
	if token := c.names["jack_token"]; !regexp.MustCompile(`^[0-9a-f]{100}$`).MatchString(token) {
		t.Errorf("refresh token %q is not 100 hex characters", token)
	}
	created, _ := strconv.ParseInt(c.names["time_1"], 10, 64)
	if age := time.Since(time.Unix(created, 0)); age < 0 || age > time.Minute {
		t.Errorf("created_at %d is not now", created)
	}
	ids := []string{c.names["idea"], c.names["id_1"], c.names["id_2"], c.names["id_3"]}
	if !slices.IsSorted(ids) || !isID.MatchString(ids[0]) {
		t.Errorf("ids %q do not rise, or are not 9 of [0-9a-z]", ids)
	}
}

var isID = regexp.MustCompile(`^[0-9a-z]{9}$`)

// The tour of the README: each curl line is played, and its answer is the one
// that stands there, but for ids, times and tokens.
func TestTour(t *testing.T) {
	c := newClient(t, newTestServer())
	_, tour, _ := strings.Cut(string(must(os.ReadFile("README.md"))), "## A tour")
	_, tour, _ = strings.Cut(tour, "```sh\n")
	tour, _, _ = strings.Cut(tour, "```")
	varying := regexp.MustCompile(`("(?:jwt|refresh_token|id)":)"[^"]*"|("created_at":)\d+`)
	//                           NAME=$(   curl ARGUMENTS | sed …"MEMBER"…   # answer
	steps := regexp.MustCompile(`(?:(\w+)=\$\()?curl (.*?)(?: \| .*"(\w+)".*)?\n((?:#.*\n)*)`).FindAllStringSubmatch(tour, -1)
	for _, step := range steps {
		name, arguments, wanted, want := step[1], step[2], step[3], strings.TrimSpace(strings.ReplaceAll(step[4], "# ", ""))
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
		got := c.send(method+" "+target, body, headers...).body
		if name != "" {
			c.names[name] = member(got, wanted)
		} else if varying.ReplaceAllString(got, "$1$2…") != varying.ReplaceAllString(want, "$1$2…") {
			t.Errorf("curl %s\nwant %s\n got %s", arguments, want, got)
		}
	}
	if lines := strings.Count("\n"+tour, "\n") - strings.Count("\n"+tour, "\n#") - 1; lines != len(steps) || lines < 10 {
		t.Errorf("%d of %d lines of the tour were played", len(steps), lines)
	}
}

// Jack, who signs up before most of the tests.
const signUp = `
	> POST /users
	{"email":"jack@test.com","name":"Jack","password":"the-Secret-123"}
	< 201
	{"jwt":"$jwt","refresh_token":"$refresh"}
`

const withToken = "X-Access-Token: $jwt"

func TestUsers(t *testing.T) {
	c := newClient(t, newTestServer())
	c.play(`
		> POST /users
		{"email":"Jack@Test.com","name":"Jack","password":"the-Secret-123"}
		< 201
		{"jwt":"$jwt","refresh_token":"$refresh"}

		> GET /me
		> X-Access-Token: $jwt
		< 200
		{"email":"Jack@Test.com","name":"Jack","avatar_url":"https://www.gravatar.com/avatar/fa2c68091754539761e1f655424ae200?d=mm\u0026s=200"}

		# The e-mail is the same in any case, and trimmed; the password is not.
		> POST /users
		{"email":" jack@test.com\n","name":"Jill","password":"the-Secret-123"}
		< 409
		{"reason":"there is a user with this e-mail already"}
		> POST /access-tokens
		{"email":"JACK@TEST.COM ","password":"the-Secret-123","name":"ignored"}
		< 201
		{"jwt":"$jwt_2","refresh_token":"$refresh_2"}
		> GET /me
		> X-Access-Token: $jwt_2
		< 200
		{"email":"Jack@Test.com","name":"Jack","avatar_url":"$avatar"}
		> POST /access-tokens
		{"email":"jack@test.com","password":"the-Secret-123 "}
		< 400
		{"reason":"wrong e-mail or password"}
		> POST /access-tokens
		{"email":"nobody@test.com","password":"the-Secret-123"}
		< 400
		{"reason":"wrong e-mail or password"}
	`)
}

func TestAccessTokens(t *testing.T) {
	c := newClient(t, newTestServer())
	c.play(signUp)
	c.play(`
		> POST /access-tokens
		{"email":"jack@test.com","password":"the-Secret-123"}
		< 201
		{"jwt":"$jwt_2","refresh_token":"$refresh_2"}

		# A refresh token works as often as one likes, and is not replaced.
		> POST /access-tokens/refresh
		{"refresh_token":"$refresh"}
		< 200
		{"jwt":"$jwt_3"}
		> POST /access-tokens/refresh
		{"refresh_token":"$refresh"}
		< 200
		{"jwt":"$jwt_4"}

		# Log-out needs an access token, and a refresh token.
		> DELETE /access-tokens
		{"refresh_token":"$refresh"}
		< 401
		< WWW-Authenticate: Bearer
		{"reason":"you can not pass!"}
		> DELETE /access-tokens
		> X-Access-Token: $jwt_4
		< 422
		{"reason":"refresh_token must be given","fields":{"refresh_token":"must be given"}}
		> DELETE /access-tokens
		> X-Access-Token: $jwt_4
		{}
		< 422
		{"reason":"refresh_token must be given","fields":{"refresh_token":"must be given"}}
		> GET /me
		> X-Access-Token: $jwt_4
		< 200

		# It ends both, and no other session.
		> DELETE /access-tokens
		> X-Access-Token: $jwt_4
		{"refresh_token":"$refresh"}
		< 204
		> GET /me
		> X-Access-Token: $jwt_4
		< 401
		{"reason":"you can not pass!"}
		> POST /access-tokens/refresh
		{"refresh_token":"$refresh"}
		< 400
		{"reason":"the refresh token is unknown, expired or logged out"}
		> POST /access-tokens/refresh
		{"refresh_token":"$refresh_2"}
		< 200
		{"jwt":"$jwt_5"}

		# There may be nothing to end. A query without the token is not looked at.
		> DELETE /access-tokens?refresh_token=&x=1&x=2;
		> X-Access-Token: $jwt_5
		{"refresh_token":"unknown"}
		< 204
		> POST /access-tokens/refresh
		{"refresh_token":"$refresh_2"}
		< 200
		{"jwt":"$jwt_6"}

		# Some clients give it in the query, once.
		> DELETE /access-tokens?refresh_token=$refresh_2&refresh_token=x
		> X-Access-Token: $jwt_6
		< 400
		{"reason":"something is given twice"}
		> DELETE /access-tokens?refresh_token=$refresh_2
		> X-Access-Token: $jwt_6
		< 204
		> POST /access-tokens/refresh
		{"refresh_token":"$refresh_2"}
		< 400
		{"reason":"the refresh token is unknown, expired or logged out"}
	`)
}

// A token made for the same user in the same second is the same token.
func TestSameSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClient(t, newTestServer())
		c.play(`
			> POST /users
			{"email":"jack@test.com","name":"Jack","password":"the-Secret-123"}
			< 201
			{"jwt":"$jwt","refresh_token":"$refresh"}
			> POST /users
			{"email":"jill@test.com","name":"Jill","password":"the-Secret-123"}
			< 201
			{"jwt":"$jill","refresh_token":"$jills_refresh"}

			# Log-out does not end the session of another user.
			> DELETE /access-tokens
			> X-Access-Token: $jwt
			{"refresh_token":"$jills_refresh"}
			< 204
			> GET /me
			> X-Access-Token: $jwt
			< 401
			> POST /access-tokens/refresh
			{"refresh_token":"$jills_refresh"}
			< 200
			{"jwt":"$jill"}

			> POST /access-tokens/refresh
			{"refresh_token":"$refresh"}
			< 200
			{"jwt":"$jwt"}
			> GET /me
			> X-Access-Token: $jwt
			< 200
		`)
	})
}

func TestLifetimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer()
		c := newClient(t, s)
		c.play(signUp)
		me, refresh := "> GET /me\n> X-Access-Token: $jwt\n", "> POST /access-tokens/refresh\n"+`{"refresh_token":"$refresh"}`+"\n"

		time.Sleep(10*time.Minute - time.Second)
		c.play(me + "< 200")
		time.Sleep(time.Second)
		c.play(me + "< 401")
		time.Sleep(30*24*time.Hour - 10*time.Minute - time.Second)
		c.play(refresh + "< 200")
		time.Sleep(time.Second)
		c.play(refresh + "< 400")
		c.expect("201", "POST /access-tokens", `{"email":"jack@test.com","password":"the-Secret-123"}`)
		if len(s.store.sessions) != 1 {
			t.Errorf("%d sessions are kept", len(s.store.sessions))
		}
	})
}

func TestIdeas(t *testing.T) {
	c := newClient(t, newTestServer())
	c.play(signUp)
	c.play(`
		> GET /ideas
		> X-Access-Token: $jwt
		< 200
		< Content-Length: 2
		[]

		# Scores come as strings, too, and nobody sets what is not theirs to set.
		> POST /ideas
		> X-Access-Token: $jwt
		{"id":"000000000","owner":"x","average_score":10,"created_at":1,"content":" a <b> & \u00e9\n\tc ","impact":"10","ease":9,"confidence":"1"}
		< 201
		{"id":"$id","content":"a \u003cb\u003e \u0026 é\n\tc","impact":10,"ease":9,"confidence":1,"average_score":6.666666666666667,"created_at":$created}
		> PUT /ideas/$id
		> X-Access-Token: $jwt
		{"id":"000000000","owner":"x","average_score":10,"created_at":1,"content":"b","impact":1,"ease":1,"confidence":1}
		< 200
		{"id":"$id","content":"b","impact":1,"ease":1,"confidence":1,"average_score":1.0,"created_at":$created}
		> GET /ideas
		> X-Access-Token: $jwt
		< 200
		[{"id":"$id","content":"b","impact":1,"ease":1,"confidence":1,"average_score":1.0,"created_at":$created}]

		# A refused change changes nothing.
		> PUT /ideas/$id
		> X-Access-Token: $jwt
		{"content":"c","impact":11,"ease":1,"confidence":1}
		< 422
		{"reason":"impact must be an integer from 1 to 10","fields":{"impact":"must be an integer from 1 to 10"}}

		# Somebody else's idea is like none at all.
		> POST /users
		{"email":"jill@test.com","name":"Jill","password":"the-Secret-123"}
		< 201
		{"jwt":"$jill","refresh_token":"$jills_refresh"}
		> PUT /ideas/$id
		> X-Access-Token: $jill
		{"content":"mine","impact":1,"ease":1,"confidence":1}
		< 404
		{"reason":"you have no such idea"}
		> PUT /ideas/000000000
		> X-Access-Token: $jill
		{"content":"mine","impact":1,"ease":1,"confidence":1}
		< 404
		{"reason":"you have no such idea"}
		> DELETE /ideas/$id
		> X-Access-Token: $jill
		< 404
		{"reason":"you have no such idea"}
		> DELETE /ideas/000000000
		> X-Access-Token: $jill
		< 404
		{"reason":"you have no such idea"}
		> GET /ideas
		> X-Access-Token: $jill
		< 200
		[]
		> GET /ideas
		> X-Access-Token: $jwt
		< 200
		[{"id":"$id","content":"b","impact":1,"ease":1,"confidence":1,"average_score":1.0,"created_at":$created}]
	`)
	c.names["ID"] = strings.ToUpper(c.names["id"])
	c.play(`
		# An id is spelled in one way.
		> DELETE /ideas/$ID
		> X-Access-Token: $jwt
		< 404

		# Clients send a body with DELETE. What is gone is gone.
		> DELETE /ideas/$id
		> X-Access-Token: $jwt
		{}
		< 204
		> DELETE /ideas/$id
		> X-Access-Token: $jwt
		< 404
		> PUT /ideas/$id
		> X-Access-Token: $jwt
		{"content":"c","impact":1,"ease":1,"confidence":1}
		< 404
		> GET /ideas
		> X-Access-Token: $jwt
		< 200
		[]
	`)
}

func TestPages(t *testing.T) {
	c := newClient(t, newTestServer())
	c.play(signUp)
	var ids [6][]string // by their impact, the newest first
	for n := range 25 {
		impact := 1 + n%5
		idea := fmt.Sprintf(`{"content":"%s","impact":%d,"ease":1,"confidence":1}`, strings.Repeat("a-long-content", 15), impact)
		id := member(c.send("POST /ideas", idea, withToken).body, "id")
		ids[impact] = slices.Insert(ids[impact], 0, id)
	}
	slices.Reverse(ids[:])
	want := slices.Concat(ids[:]...) // the highest average first
	for _, test := range []struct {
		query, link string
		want        []string
	}{
		{"", `</ideas?page=1>; rel="first", </ideas?page=2>; rel="next", </ideas?page=3>; rel="last"`, want[:10]},
		{"?page=1", `</ideas?page=1>; rel="first", </ideas?page=2>; rel="next", </ideas?page=3>; rel="last"`, want[:10]},
		{"?page=2", `</ideas?page=1>; rel="first", </ideas?page=1>; rel="prev", </ideas?page=3>; rel="next", </ideas?page=3>; rel="last"`, want[10:20]},
		{"?page=03&x=1", `</ideas?page=1>; rel="first", </ideas?page=2>; rel="prev", </ideas?page=3>; rel="last"`, want[20:]},
		{"?page=4", `</ideas?page=1>; rel="first", </ideas?page=3>; rel="prev", </ideas?page=3>; rel="last"`, nil},
		{"?page=9223372036854775807", `</ideas?page=1>; rel="first", </ideas?page=3>; rel="prev", </ideas?page=3>; rel="last"`, nil},
	} {
		answer := c.send("GET /ideas"+test.query, "", withToken)
		if answer.StatusCode != 200 || answer.Header.Get("Link") != test.link {
			t.Errorf("GET /ideas%s: %d, Link: %s\nwant 200, Link: %s", test.query, answer.StatusCode, answer.Header.Get("Link"), test.link)
		}
		var got []string
		for _, id := range regexp.MustCompile(`"id":"(\w+)"`).FindAllStringSubmatch(answer.body, -1) {
			got = append(got, id[1])
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("GET /ideas%s lists\n%q, want\n%q", test.query, got, test.want)
		}
	}
}

func TestPaths(t *testing.T) {
	c := newClient(t, newTestServer())
	c.play(signUp)
	c.play(`
		> POST //ideas
		> X-Access-Token: $jwt
		{"content":"the-content","impact":8,"ease":8,"confidence":8}
		< 201
		{"id":"$id","content":"the-content","impact":8,"ease":8,"confidence":8,"average_score":8.0,"created_at":$created}
		> GET /ideas/?page=1
		> X-Access-Token: $jwt
		< 200
		[{"id":"$id","content":"the-content","impact":8,"ease":8,"confidence":8,"average_score":8.0,"created_at":$created}]
		> DELETE //ideas///$id/
		> X-Access-Token: $jwt
		< 204

		> HEAD /me
		> X-Access-Token: $jwt
		< 200
		< Content-Length: 135
		> HEAD /ideas
		> X-Access-Token: $jwt
		< 200
		< Content-Length: 2
		> HEAD /healthz/
		< 200
		> HEAD /me
		< 401

		> GET /
		< 404
		{"reason":"there is nothing here"}
		> GET /ideas/x/y
		< 404
		> GET /ideas/..%2f..%2fetc/passwd
		< 404
		> PATCH /ideas
		< 405
		< Allow: GET, HEAD, POST
		{"reason":"this method is not for this path"}
		> GET /ideas/$id
		< 405
		< Allow: PUT, DELETE
		> GET //access-tokens/
		< 405
		< Allow: POST, DELETE
		> POST /me
		{}
		< 405
		< Allow: GET, HEAD
		> HEAD /users
		< 405
		< Allow: POST
	`)
}

// The mux would answer these two in text.
func TestAsterisk(t *testing.T) {
	c := newClient(t, newTestServer("-cors-origin", "none"))
	c.origin = ""
	for _, method := range []string{"GET", "OPTIONS"} {
		r := httptest.NewRequest(method, "*", nil)
		w := httptest.NewRecorder()
		newTestServer("-cors-origin", "none").ServeHTTP(w, r)
		if a := c.read(r, w.Result()); a.StatusCode != 404 {
			t.Errorf("%s *: %s", method, a.Status)
		}
	}
}

func TestCORS(t *testing.T) {
	all := newClient(t, newTestServer())
	for _, path := range []string{
		"/users", "/me", "/access-tokens", "/access-tokens/refresh", "/ideas", "/ideas/", "/ideas/x", "/nowhere", "/healthz",
	} {
		all.play(fmt.Sprintf(`
			> OPTIONS %s
			> Origin: https://example.org
			> Access-Control-Request-Method: POST
			> Access-Control-Request-Headers: content-type,contenttype,x-access-token
			< 204
			< Access-Control-Allow-Origin: *
			< Access-Control-Allow-Methods: GET, POST, PUT, DELETE
			< Access-Control-Allow-Headers: content-type,contenttype,x-access-token
			< Access-Control-Max-Age: 86400
			< Content-Type:
		`, path))
	}
	all.play(`
		> GET /me
		> Origin: https://example.org
		< 401
		< Access-Control-Allow-Origin: *
		< Access-Control-Expose-Headers: Link, Retry-After, X-Request-Id
		< Access-Control-Allow-Credentials:
	`)

	one := newClient(t, newTestServer("-cors-origin", "https://ideas.example"))
	one.origin = "https://ideas.example"
	one.play(`
		> OPTIONS /me
		> Origin: https://example.org
		> Access-Control-Request-Method: POST
		< 204
		< Access-Control-Allow-Origin: https://ideas.example
		< Vary: Origin
		> GET /me
		> Origin: https://example.org
		< 401
		< Access-Control-Allow-Origin: https://ideas.example
		< Vary: Origin
	`)

	none := newClient(t, newTestServer("-cors-origin", "none"))
	none.origin = ""
	none.play(`
		> OPTIONS /me
		> Origin: https://example.org
		> Access-Control-Request-Method: POST
		< 405
		< Access-Control-Allow-Origin:
		< Access-Control-Allow-Methods:
		> GET /me
		> Origin: https://example.org
		< 401
		< Access-Control-Allow-Origin:
		< Access-Control-Expose-Headers:
	`)
}

func TestBeyondTheDocument(t *testing.T) {
	s := newTestServer()
	c := newClient(t, s)
	c.play(`
		> GET /.well-known/jwks.json
		< 200
		{"keys":[{"alg":"RS256","e":"AQAB","kty":"RSA","n":"$modulus","use":"sig"}]}
		> GET /healthz
		< 200
		{"status":"ok"}
	`)
	if c.names["modulus"] != s.tokens.jwk()["n"] {
		t.Errorf("modulus %s is not that of the key", c.names["modulus"])
	}
}

// While the disk is full nothing changes, reads go on, and it heals by itself.
func TestFullDisk(t *testing.T) {
	s := newTestServer()
	var full atomic.Bool
	var written atomic.Int64
	weigh := weigh(&written)
	s.store = mustStart(t, scratch(t), func(op, path string, do func() error) error {
		before := written.Load()
		if err := weigh(op, path, do); err != nil || !full.Load() || written.Load()-before < 30 {
			return err
		}
		return syscall.ENOSPC // there is room for a line of 30 bytes
	})
	c := newClient(t, s)
	c.play(signUp)
	full.Store(true)
	c.play(`
		> POST /ideas
		> X-Access-Token: $jwt
		{"content":"a","impact":1,"ease":1,"confidence":1}
		< 503
		< Retry-After: 1
		{"reason":"nothing can be stored just now; try again in a moment"}
		> POST /users
		{"email":"jill@test.com","name":"Jill","password":"the-Secret-123"}
		< 503
		> POST /access-tokens
		{"email":"jack@test.com","password":"the-Secret-123"}
		< 503
		> DELETE /access-tokens
		> X-Access-Token: $jwt
		{"refresh_token":"$refresh"}
		< 503
		> GET /healthz
		< 503

		# What cannot be does not come near the disk.
		> POST /users
		{"email":"jack@test.com","name":"Jack","password":"the-Secret-123"}
		< 409
		> PUT /ideas/000000000
		> X-Access-Token: $jwt
		{"content":"a","impact":1,"ease":1,"confidence":1}
		< 404
		> DELETE /ideas/000000000
		> X-Access-Token: $jwt
		< 404
		> GET /ideas
		> X-Access-Token: $jwt
		< 200
		[]
	`)
	full.Store(false)
	c.play(`
		> GET /healthz
		< 200
		{"status":"ok"}
	`)
	before := written.Load()
	c.play(`
		# Where all is well, nothing is tried.
		> GET /healthz
		< 200
	`)
	if written.Load() != before {
		t.Error("a healthy server writes for /healthz")
	}
	c.play(`
		> POST /access-tokens/refresh
		{"refresh_token":"$refresh"}
		< 200
		> POST /ideas
		> X-Access-Token: $jwt
		{"content":"a","impact":1,"ease":1,"confidence":1}
		< 201
	`)
}

// Tables:

// everyAnswer is what is true of every answer in these tests.
func everyAnswer(a answer, method, origin string) map[string]bool {
	has := func(name, value string) bool { return a.Header.Get(name) == value }
	var problem struct{ Fields fieldErrors }
	json.Unmarshal([]byte(a.body), &problem)
	return map[string]bool{
		"nosniff":                             has("X-Content-Type-Options", "nosniff"),
		"X-Frame-Options":                     has("X-Frame-Options", "SAMEORIGIN"),
		"no-store":                            has("Cache-Control", "no-store"),
		"X-Request-Id":                        !has("X-Request-Id", ""),
		"Access-Control-Allow-Origin":         has("Access-Control-Allow-Origin", origin),
		"nothing in a 204":                    a.StatusCode != 204 || a.body == "" && has("Content-Type", ""),
		"JSON in all others":                  a.StatusCode == 204 || has("Content-Type", "application/json; charset=utf-8"),
		"a Content-Length, and no chunks":     len(a.TransferEncoding) == 0,
		"a reason, or being no error":         a.StatusCode < 400 || a.reason != "" || method == "HEAD" && a.body == "",
		"an error, or no reason":              a.StatusCode >= 400 || a.reason == "",
		"a status that is no number":          !regexp.MustCompile(`"status":\s*[-\d]`).MatchString(a.body),
		"a 422's fields, named in the reason": a.StatusCode != 422 || a.reason == problem.Fields.Error(),
		"being a 422, or no fields":           a.StatusCode == 422 || problem.Fields == nil,
		"WWW-Authenticate on a 401 only":      has("WWW-Authenticate", "Bearer") == (a.StatusCode == 401),
		"Allow on a 405 only":                 has("Allow", "") == (a.StatusCode != 405),
		"Retry-After on a 429 and a 503 only": has("Retry-After", "") == (a.StatusCode != 429 && a.StatusCode != 503),
	}
}

func TestTokenHeaders(t *testing.T) {
	s := newTestServer()
	c := newClient(t, s)
	c.play(signUp)
	for _, test := range []struct {
		headers string
		want    int
	}{
		{"X-Access-Token: $jwt", 200},
		{"x-access-token: $jwt", 200},
		{"X-Access-Token: Bearer $jwt", 200},
		{"Authorization: Bearer $jwt", 200},
		{"authorization: bearer  $jwt", 200},
		{"X-Access-Token: $jwt\n> Authorization: Basic ignored", 200},
		{"Accept: */*", 401},
		{"X-Access-Token: null", 401},
		{"X-Access-Token: [object Object]", 401},
		{"X-Access-Token: $jwt\n> X-Access-Token: $jwt", 401},
		{"X-Access-Token: null\n> Authorization: Bearer $jwt", 401},
		{"X-Access-Token: null\n> X-Access-Token: null\n> Authorization: Bearer $jwt", 401},
		{"Authorization: $jwt", 401},
		{"Authorization: Basic $jwt", 401},
		{"Authorization: Bearer $jwt\n> Authorization: Bearer $jwt", 401},
		{"X-Access-Token: ${jwt}x", 401},
		{"X-Access-Token: $refresh", 401},
	} {
		c.play(fmt.Sprintf("> GET /me\n> %s\n< %d", test.headers, test.want))
	}
	// A token of ours is not enough: its user must be there.
	c.names["nobodys"] = must(s.tokens.sign(claims{UserID: parseSerial("zzzzzzzzz")}))
	c.play(`
		> GET /me
		> X-Access-Token: $nobodys
		< 401
	`)
	// Public routes do not look at it.
	c.play(`
		> POST /access-tokens/refresh
		> X-Access-Token: null
		> Authorization: [object Object]
		{"refresh_token":"$refresh"}
		< 200
	`)
}

// Bodies of every kind, each with what is wrong with it.
func TestBodies(t *testing.T) {
	const (
		idea     = `{"content":"a","impact":1,"ease":2,"confidence":3}`
		form     = "content=a+%26+b&impact=1&ease=2&confidence=3"
		notJSON  = "400 the body must be one JSON object, or a form"
		notForm  = "400 the form or query cannot be read"
		twice    = "400 something is given twice"
		urlCoded = "application/x-www-form-urlencoded"
		noType   = "415 the Content-Type must be application/json or application/x-www-form-urlencoded"
	)
	c := newClient(t, newTestServer())
	c.play(signUp)
	for _, test := range []struct{ contentType, body, want string }{
		{"application/json", idea, "201"},
		{"application/json; charset=utf-8", idea, "201"},
		{"Application/JSON;anything", idea, "201"},
		{"", idea, "201"},
		{"application/json", " \r\n\t" + idea + " \r\n\t", "201"},
		{urlCoded, idea, "201"},
		{urlCoded, "\n " + idea, "201"},
		{urlCoded, form, "201"},
		{urlCoded + "; charset=utf-8", form, "201"},

		{"text/plain", idea, noType},
		{"multipart/form-data; boundary=x", idea, noType},
		{"application/jsonx", idea, noType},
		{"application/xml", "<content/>", noType},

		{"application/json", "", notJSON},
		{"", "", notJSON},
		{"application/json", form, notJSON},
		{"application/json", "null", notJSON},
		{"application/json", "[" + idea + "]", notJSON},
		{"application/json", `"content"`, notJSON},
		{"application/json", idea[:len(idea)-1], notJSON},
		{"application/json", idea + "x", notJSON},
		{"application/json", idea + idea, notJSON},
		{"application/json", `{"content":'a'}`, notJSON},
		{"application/json", `{"content":"a",}`, notJSON},
		{"application/json", "{\"content\":\"a\xff\"}", notJSON},
		{"application/json", strings.Repeat(`{"a":`, 10_000), notJSON},
		{urlCoded, idea[:len(idea)-1], notJSON},
		{urlCoded, "content=%zz", notForm},
		{urlCoded, "content=a;impact=1", notForm},

		{"application/json", `{"content":"a","content":"a","impact":1,"ease":2,"confidence":3}`, twice},
		{"application/json", `{"content":"a","\u0063ontent":"b","impact":1,"ease":2,"confidence":3}`, twice},
		{"application/json", `{"x":1,"x":2,"content":"a","impact":1,"ease":2,"confidence":3}`, twice},
		{urlCoded, form + "&impact=1", twice},
		{"application/json", `{"content":"\":: } { ] [ \\","impact":1,"ease":2,"confidence":3}`, "201"},
		{"application/json", `{"content":"} [ \"","content":"b","impact":1,"ease":2,"confidence":3}`, twice},
		{"application/json", `{"x":{"x":[{"x":1}]},"y":[{},{"x":2}],"content":"a","impact":1,"ease":2,"confidence":3}`, "201"},

		// Names are compared exactly.
		{"application/json", `{"Content":"a","impact":1,"ease":2,"confidence":3}`, "422 content must be given"},
		{urlCoded, "Content=a&impact=1&ease=2&confidence=3", "422 content must be given"},
		{urlCoded, "content=a%22b%5Cc%0Ad%3Ce&impact=1&ease=2&confidence=3", "201"},
		{urlCoded, "content=a%ff&impact=1&ease=2&confidence=3", "422 content must not hold control characters or U+FFFD"},
		{urlCoded, "", "422 confidence must be given; content must be given; ease must be given; impact must be given"},
	} {
		c.expect(test.want, "POST /ideas", test.body, withToken, "Content-Type: "+test.contentType)
	}
}

// allRoutes are those of server.routes, as requests.
var allRoutes = []string{
	"POST /access-tokens/refresh", "POST /access-tokens", "DELETE /access-tokens", "GET /me", "POST /ideas",
	"DELETE /ideas/x", "GET /ideas", "PUT /ideas/x", "POST /users", "GET /.well-known/jwks.json", "GET /healthz",
}

func TestBodyLimit(t *testing.T) {
	c := newClient(t, newTestServer())
	c.play(signUp)
	const idea = `{"content":"a","impact":1,"ease":2,"confidence":3}`
	atLimit := idea + strings.Repeat(" ", 64<<10-len(idea))
	c.expect("201", "POST /ideas", atLimit, withToken)
	for _, route := range append(allRoutes, "POST /nowhere", "PATCH /me") {
		c.expect("413 the body must be at most 64 KiB", route, atLimit+" ", withToken)
	}
	// With no Content-Length it shows only in the reading.
	r := httptest.NewRequest("POST", "/users", io.MultiReader(strings.NewReader(atLimit+" ")))
	w := httptest.NewRecorder()
	newTestServer().ServeHTTP(w, r)
	if w.Code != 413 {
		t.Errorf("64 KiB and a byte in chunks: %d", w.Code)
	}
}

// Every field, and both sides of every rule.
func TestFields(t *testing.T) {
	const (
		control = " must not hold control characters or U+FFFD"
		length  = " must be 1 to 255 characters long"
		anEmail = "422 email must be an e-mail address"
		weak    = "422 password must have at least 8 characters, among them an upper-case letter, a lower-case letter and a number"
		aScore  = "422 impact must be an integer from 1 to 10"
		aPage   = "422 page must be an integer above 0"
		newUser = `{"email":"%s","name":"Jack","password":"the-Secret-123"}`
		named   = `{"email":"jack@test.com","name":%s,"password":"the-Secret-123"}`
		secret  = `{"email":"jack@test.com","name":"Jack","password":%s}`
		content = `{"content":%s,"impact":1,"ease":1,"confidence":1}`
		impact  = `{"content":"a","impact":%s,"ease":1,"confidence":1}`
		taken   = "409 there is a user with this e-mail already" // all else is well
		wrong   = "400 wrong e-mail or password"
		logIn   = `{"email":%s,"password":%s}`
		refresh = `{"refresh_token":%s}`
		unknown = "400 the refresh token is unknown, expired or logged out"
	)
	f, long := fmt.Sprintf, strings.Repeat // as the rows are long
	c := newClient(t, newTestServer())
	c.play(signUp)
	for _, test := range []struct{ route, body, want string }{
		{"POST /users", `{}`, "422 email must be given; name must be given; password must be given"},
		{"POST /access-tokens", `{}`, "422 email must be given; password must be given"},
		{"POST /access-tokens/refresh", `{}`, "422 refresh_token must be given"},
		{"DELETE /access-tokens", `{}`, "422 refresh_token must be given"},
		{"POST /ideas", `{}`, "422 confidence must be given; content must be given; ease must be given; impact must be given"},
		{"PUT /ideas/x", `{}`, "422 confidence must be given; content must be given; ease must be given; impact must be given"},
		{"PUT /ideas/x", `{"content":"a","impact":1,"ease":0,"confidence":11}`, "422 confidence must be an integer from 1 to 10; ease must be an integer from 1 to 10"},

		{"POST /users", f(newUser, "jack@test.com"), taken},
		{"POST /users", f(newUser, `\t JACK@test.com\r\n`), taken},
		{"POST /users", f(newUser, "plain"), anEmail},
		{"POST /users", f(newUser, "@test.com"), anEmail},
		{"POST /users", f(newUser, "a@"), anEmail},
		{"POST /users", f(newUser, "a@b@test.com"), anEmail},
		{"POST /users", f(newUser, "a b@test.com"), anEmail},
		{"POST /users", f(newUser, "a@test.com, b@test.com"), anEmail},
		{"POST /users", f(newUser, "<a@test.com>"), anEmail},
		{"POST /users", f(newUser, "A <a@test.com>"), anEmail},
		{"POST /users", f(newUser, "a@test.com (a)"), anEmail},
		{"POST /users", f(newUser, `\"a\"@test.com`), anEmail},
		{"POST /users", f(newUser, `\"a b\"@test.com`), anEmail},
		{"POST /users", f(newUser, "a@[127.0.0.1]"), anEmail},
		{"POST /users", f(newUser, "a@te_st.com"), anEmail},
		{"POST /users", f(newUser, "a@test..com"), anEmail},
		{"POST /users", f(newUser, "é@test.com"), anEmail},
		{"POST /users", f(newUser, "a@tést.com"), anEmail},
		{"POST /users", f(newUser, long("a", 250)+"@b.c"), "201"},
		{"POST /users", f(newUser, long("a", 251)+"@b.c"), "422 email must be 1 to 254 characters long"},
		{"POST /users", f(newUser, " "), "422 email must be 1 to 254 characters long"},
		{"POST /users", `{"email":null,"name":[],"password":12345678}`, "422 email must be text; name must be text; password must be text"},

		{"POST /users", f(named, `" J "`), taken},
		{"POST /users", f(named, `" "`), "422 name" + length},
		{"POST /users", f(named, `"`+long("é", 255)+`"`), taken},
		{"POST /users", f(named, `"`+long("é", 256)+`"`), "422 name" + length},
		{"POST /users", f(named, `"a\u0000b"`), "422 name" + control},

		{"POST /users", f(secret, `"aB3aB3aB"`), taken},
		{"POST /users", f(secret, `"aB3aB3a"`), weak},
		{"POST /users", f(secret, `"éÉ3éÉ3éÉ"`), taken},
		{"POST /users", f(secret, `"éÉ3éÉ3é"`), weak},
		{"POST /users", f(secret, `"ab3ab3ab"`), weak},
		{"POST /users", f(secret, `"AB3AB3AB"`), weak},
		{"POST /users", f(secret, `"aBcaBcaB"`), weak},
		{"POST /users", f(secret, `"aB3`+long("x", 1021)+`"`), taken},
		{"POST /users", f(secret, `"aB3`+long("x", 1022)+`"`), "422 password must be 1 to 1024 bytes long"},
		{"POST /users", f(secret, `"aB3aB3aB\ud800"`), "422 password" + control},
		{"POST /users", f(secret, `"aB3aB3aB\ufffd"`), "422 password" + control},
		{"POST /users", f(secret, `"aB3aB3aB\u001b"`), "422 password" + control},
		{"POST /users", f(secret, `"aB3 \t\n aB3"`), taken},

		{"POST /access-tokens", f(logIn, `"jack@test.com"`, `"short"`), wrong},
		{"POST /access-tokens", f(logIn, `"nobody"`, `"the-Secret-123"`), wrong},
		{"POST /access-tokens", f(logIn, `""`, `""`), "422 email must be 1 to 254 characters long; password must be 1 to 1024 bytes long"},
		{"POST /access-tokens", f(logIn, `"a"`, `"\ufffd"`), "422 password" + control},
		{"POST /access-tokens/refresh", f(refresh, `"x"`), unknown},
		{"POST /access-tokens/refresh", f(refresh, `"`+long("x", 60_000)+`"`), unknown},
		{"POST /access-tokens/refresh", f(refresh, `null`), "422 refresh_token must be text"},

		{"POST /ideas", f(content, `" \u0061\n\tb "`), "201"},
		{"POST /ideas", f(content, `"`+long("😀", 255)+`"`), "201"},
		{"POST /ideas", f(content, `"`+long("😀", 256)+`"`), "422 content" + length},
		{"POST /ideas", f(content, `"  `+long("a", 255)+`  "`), "201"},
		{"POST /ideas", f(content, `" \t\r\n\u00a0"`), "422 content" + length},
		{"POST /ideas", f(content, `"a\rb"`), "422 content" + control},
		{"POST /ideas", f(content, `"a\u007fb"`), "422 content" + control},
		{"POST /ideas", f(content, `"a\u0085b"`), "422 content" + control},
		{"POST /ideas", f(content, `"\udc00"`), "422 content" + control},
		{"POST /ideas", f(content, `7`), "422 content must be text"},
		{"POST /ideas", f(content, `{"a":1}`), "422 content must be text"},

		{"POST /ideas", f(impact, `1`), "201"},
		{"POST /ideas", f(impact, `10`), "201"},
		{"POST /ideas", f(impact, `"1"`), "201"},
		{"POST /ideas", f(impact, `"10"`), "201"},
		{"POST /ideas", f(impact, `"\u0038"`), "201"},
		{"POST /ideas", f(impact, `"\\8"`), aScore},
		{"POST /ideas", f(impact, `0`), aScore},
		{"POST /ideas", f(impact, `11`), aScore},
		{"POST /ideas", f(impact, `-1`), aScore},
		{"POST /ideas", f(impact, `-0`), aScore},
		{"POST /ideas", f(impact, `8.5`), aScore},
		{"POST /ideas", f(impact, `8.0`), aScore},
		{"POST /ideas", f(impact, `1e1`), aScore},
		{"POST /ideas", f(impact, `18446744073709551617`), aScore},
		{"POST /ideas", f(impact, `true`), aScore},
		{"POST /ideas", f(impact, `null`), aScore},
		{"POST /ideas", f(impact, `[8]`), aScore},
		{"POST /ideas", f(impact, `""`), aScore},
		{"POST /ideas", f(impact, `" 8"`), aScore},
		{"POST /ideas", f(impact, `"+8"`), aScore},
		{"POST /ideas", f(impact, `"8.0"`), aScore},
		{"POST /ideas", f(impact, `"٨"`), aScore},

		{"GET /ideas?page=0", "", aPage},
		{"GET /ideas?page=-1", "", aPage},
		{"GET /ideas?page=1.0", "", aPage},
		{"GET /ideas?page=one", "", aPage},
		{"GET /ideas?page=", "", aPage},
		{"GET /ideas?page=%201", "", aPage},
		{"GET /ideas?page=%2B1", "", aPage},
		{"GET /ideas?page=1e1", "", aPage},
		{"GET /ideas?page=0x1", "", aPage},
		{"GET /ideas?page=18446744073709551616", "", aPage},
		{"GET /ideas?page=9223372036854775808", "", aPage},
		{"GET /ideas?page=%zz", "", aPage},
		{"GET /ideas?page=1;", "", aPage},
		{"GET /ideas?page=1&x=%zz", "", "200"},
		{"GET /ideas?page=1&page=2", "", aPage},
		{"GET /ideas?page=1&x=1&x=2", "", "200"},
	} {
		c.expect(test.want, test.route, test.body, withToken)
	}
}

// The sum of the scores is 3 to 30. The average is the shortest form of the
// double, always with a decimal point.
func TestAverages(t *testing.T) {
	want := strings.Fields(`
		1.0 1.3333333333333333 1.6666666666666667 2.0 2.3333333333333335 2.6666666666666665
		3.0 3.3333333333333335 3.6666666666666665 4.0 4.333333333333333 4.666666666666667
		5.0 5.333333333333333 5.666666666666667 6.0 6.333333333333333 6.666666666666667
		7.0 7.333333333333333 7.666666666666667 8.0 8.333333333333334 8.666666666666666
		9.0 9.333333333333334 9.666666666666666 10.0`)
	for n, average := range want {
		sum := n + 3
		i := idea{Impact: min(10, sum-2), Ease: max(1, min(10, sum-11)), Confidence: max(1, sum-20)}
		if i.sum() != sum {
			t.Fatalf("the scores %+v do not make %d", i, sum)
		}
		if i.ID, i.Content = 1, "tea"; i.seal() != nil || !strings.Contains(string(i.json), `"average_score":`+average+`,`) {
			t.Errorf("the average of %d/3 in %s is not %s", sum, i.json, average)
		}
	}
}

// Guesses, storms, slow clients, panics, and the log:

// Ten failures for one e-mail from one address, and the guesser must wait.
// Nobody else must.
func TestGuessing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer()
		c := newClient(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.RemoteAddr = r.Header.Get("From")
			s.ServeHTTP(w, r)
		}))
		c.play(signUp)
		logIn := func(want, from, email, password string, headers ...string) {
			t.Helper()
			c.expect(want, "POST /access-tokens", fmt.Sprintf(`{"email":%q,"password":%q}`, email, password), append(headers, "From: "+from)...)
		}
		const (
			right, wrong = "the-Secret-123", "a wrong one"
			refused      = "400 wrong e-mail or password"
		)
		throttled := func(seconds int) string {
			return fmt.Sprintf("429 too many failed log-ins; try again in %d seconds", seconds)
		}
		for _, email := range []string{"jack@test.com", "nobody@test.com"} {
			for range 9 {
				logIn(refused, "192.0.2.1:1", email, wrong)
			}
			logIn(refused, "192.0.2.1:2", strings.ToUpper(email), wrong)
			logIn(throttled(30), "192.0.2.1:3", email, right)
			// What a client says of its address changes nothing.
			logIn(throttled(30), "192.0.2.1:4", email, wrong, "X-Forwarded-For: 192.0.2.9")
		}
		logIn("201", "192.0.2.2:1", "jack@test.com", right)
		logIn(refused, "192.0.2.1:1", "jill@test.com", wrong)

		for _, wait := range []int{30, 60, 120, 240, 480, 900, 900} {
			logIn(throttled(wait), "192.0.2.1:5", "jack@test.com", wrong)
			time.Sleep(time.Duration(wait)*time.Second - time.Millisecond)
			logIn(throttled(1), "192.0.2.1:5", "jack@test.com", right)
			time.Sleep(time.Millisecond)
			logIn(refused, "192.0.2.1:6", "jack@test.com", wrong)
		}
		// A success clears it.
		time.Sleep(900 * time.Second)
		logIn("201", "192.0.2.1:7", "jack@test.com", right)
		for range 10 {
			logIn(refused, "192.0.2.1:8", "jack@test.com", wrong)
		}
		logIn(throttled(30), "192.0.2.1:9", "jack@test.com", right)

		// In IPv6 a /64 is one household.
		for n := range 10 {
			logIn(refused, fmt.Sprintf("[2001:db8::%d]:1", n), "jack@test.com", wrong)
		}
		logIn(throttled(30), "[2001:db8::ffff]:1", "jack@test.com", right)
		logIn("201", "[2001:db8:0:1::1]:1", "jack@test.com", right)

		// After an hour all is forgotten.
		time.Sleep(time.Hour + time.Second)
		for range 10 {
			logIn(refused, "192.0.2.1:1", "nobody@test.com", wrong)
		}
	})
}

// Guesses that are under way at the same time do not slip through, but for
// those that are at work beside the tenth that fails.
func TestGuessingAtOnce(t *testing.T) {
	for _, slots := range []int{1, 4} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer()
			s.hashing = newGate(slots, 100)
			c := newClient(t, s)
			for _, burst := range []struct{ least, most, wait int }{{10, 9 + slots, 30}, {1, 1, 60}, {1, 1, 120}} {
				var wrong atomic.Int32
				atOnce(30, func(int) {
					a := c.send("POST /access-tokens", `{"email":"a@b.c","password":"x"}`)
					if a.StatusCode == 400 {
						wrong.Add(1)
					} else if wait := a.Header.Get("Retry-After"); a.StatusCode != 429 || wait != strconv.Itoa(burst.wait) {
						t.Errorf("%s, Retry-After %s, want 429 and %d", a.Status, wait, burst.wait)
					}
				})
				if n := int(wrong.Load()); n < burst.least || n > burst.most {
					t.Errorf("%d slots: %d guesses of 30 at once, want %d to %d", slots, n, burst.least, burst.most)
				}
				time.Sleep(time.Duration(burst.wait) * time.Second)
			}
		})
	}
}

// Who knows the password is no guesser, however many devices log in at once.
func TestManyDevices(t *testing.T) {
	s := newTestServer()
	s.hashing = newGate(14, 0)
	c := newClient(t, s)
	c.play(signUp)
	atOnce(14, func(int) {
		c.expect("201", "POST /access-tokens", `{"email":"jack@test.com","password":"the-Secret-123"}`)
	})
}

func TestGuessesAreBounded(t *testing.T) {
	g := guesses{made: make(map[guesser]failures)}
	for n := range 100_001 {
		g.end(guesser{email: strconv.Itoa(n)}, false)
	}
	if len(g.made) > 50_000 {
		t.Errorf("%d guessers are remembered", len(g.made))
	}
}

// An unknown e-mail and a wrong password are alike to the byte, and cost the same
// hash: the same memory and, at best, as on a busy machine nothing else is sure,
// the same time.
func TestUnknownEmail(t *testing.T) {
	s := newTestServer()
	c := newClient(t, s)
	c.play(signUp)
	const least, most = 1024 * argonMemory, 1.1 * 1024 * argonMemory
	answer := func(email string) (text string, ns float64) {
		before := used()
		a := c.send("POST /access-tokens", fmt.Sprintf(`{"email":%q,"password":"a wrong one"}`, email))
		after := used()
		if bytes := after["B"] - before["B"]; bytes < least || bytes > most {
			t.Errorf("%s takes %.0f bytes", email, bytes)
		}
		a.Header.Del("Date")
		a.Header.Del("X-Request-Id")
		return fmt.Sprint(a.StatusCode, a.Header, a.body), after["ns"] - before["ns"]
	}
	var known, unknown []float64
	for range 9 {
		a, took := answer("jack@test.com")
		known = append(known, took)
		b, took := answer("nobody@test.com")
		unknown = append(unknown, took)
		if a != b {
			t.Fatalf("a wrong password is answered\n%s\nan unknown e-mail\n%s", a, b)
		}
	}
	if ratio := slices.Min(unknown) / slices.Min(known); ratio < 0.5 || ratio > 2 {
		t.Errorf("an unknown e-mail takes %.2f times as long as a wrong password", ratio)
	}
	u, _ := s.store.userByEmail("jack@test.com")
	if head := regexp.MustCompile(`^\$argon2id\$v=19\$m=19456,t=2,p=1\$`); !head.MatchString(u.Password) || !head.MatchString(noPassword) {
		t.Errorf("the costs of %s and %s differ", u.Password, noPassword)
	}
}

// The gate has slots for few, a line for some, and patience for 5 seconds.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(2, 3)
		var working, done, busy atomic.Int32
		work := func() error {
			if working.Add(1) > 2 {
				t.Error("more than two at work")
			}
			time.Sleep(3 * time.Second)
			working.Add(-1)
			done.Add(1)
			return nil
		}
		for range 8 {
			go func() {
				if err := g.do(t.Context(), work); err == errBusy {
					busy.Add(1)
				}
			}()
		}
		for _, step := range []struct {
			after      time.Duration
			done, busy int32
		}{
			{0, 0, 3},                       // two at work, three wait
			{3100 * time.Millisecond, 2, 3}, // two more at work
			{2 * time.Second, 2, 4},         // one waited too long
			{time.Second, 4, 4},
		} {
			time.Sleep(step.after)
			synctest.Wait()
			if done.Load() != step.done || busy.Load() != step.busy {
				t.Errorf("%d done and %d turned away, want %d and %d", done.Load(), busy.Load(), step.done, step.busy)
			}
		}
		gone, leave := context.WithCancel(t.Context())
		leave()
		go g.do(t.Context(), work)
		go g.do(t.Context(), work)
		synctest.Wait()
		if err := g.do(gone, work); err != errBusy {
			t.Errorf("one who has gone still waits: %v", err)
		}
		time.Sleep(time.Minute) // until all are done
	})
}

// On one core a hash has a thread of its own; BenchmarkGate shows what for.
func TestOneCore(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	during := 0
	newGate(1, 0).do(t.Context(), func() error { during = runtime.GOMAXPROCS(0); return nil })
	if after := runtime.GOMAXPROCS(0); during != 2 || after != 1 {
		t.Errorf("GOMAXPROCS is %d during a hash, and %d after it", during, after)
	}
}

// Everybody in a storm of log-ins is answered, and who is turned away is told
// to come back.
func TestStorm(t *testing.T) {
	s := newTestServer()
	s.hashing = newGate(1, 5)
	c := newClient(t, s)
	c.play(signUp)
	var answers [600]atomic.Int32 // by status
	atOnce(40, func(int) {
		answers[c.send("POST /access-tokens", `{"email":"jack@test.com","password":"the-Secret-123"}`).StatusCode].Add(1)
	})
	if in, away := answers[201].Load(), answers[503].Load(); in < 6 || away == 0 || in+away != 40 {
		t.Errorf("%d let in and %d turned away, of 40", in, away)
	}
}

// Clients that send a byte now and then are cut off, and block nobody. Time
// here is that of synctest, and so the network is a pipe.
func TestSlowClients(t *testing.T) {
	for _, test := range []struct {
		name, sent string
		cutAfter   time.Duration
	}{
		{"in the headers", "GET /healthz HTTP/1.1\r\nHost: x\r\nX-", 5 * time.Second},
		{"in the body", "POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{", 10 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithCancel(t.Context())
				network := make(pipes)
				done := make(chan error)
				go func() { done <- serve(ctx, newTestServer(), network) }()

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
					t.Errorf("another client got %s after %v", got, time.Since(start))
				}
				io.Copy(io.Discard, slow) // until it is cut off
				if took := time.Since(start); took < test.cutAfter || took > test.cutAfter+time.Second {
					t.Errorf("cut off after %v, want %v", took, test.cutAfter)
				}
				stop()
				if err := <-done; err != nil {
					t.Error(err)
				}
				time.Sleep(time.Minute) // until the clients have seen it
			})
		})
	}
}

// Requests under way when the server is told to stop have 10 seconds.
func TestShutdown(t *testing.T) {
	for _, test := range []struct {
		takes, stopsAfter time.Duration
		answered          bool
	}{
		{9 * time.Second, 9 * time.Second, true},
		{20 * time.Second, 10 * time.Second, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestServer()
			s.public("GET /slow", func(w http.ResponseWriter, r *http.Request) error {
				time.Sleep(test.takes)
				return writeJSON(w, 200, "done")
			})
			ctx, stop := context.WithCancel(t.Context())
			network := make(pipes)
			done := make(chan error)
			go func() { done <- serve(ctx, s, network) }()
			conn := network.dial()
			io.WriteString(conn, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
			synctest.Wait()

			start := time.Now()
			stop()
			got, _ := io.ReadAll(conn)
			if err := <-done; err != nil {
				t.Error(err)
			}
			took := time.Since(start)
			if answered := bytes.HasSuffix(got, []byte(`"done"`)); answered != test.answered || took < test.stopsAfter || took > test.stopsAfter+time.Second {
				t.Errorf("stopped after %v, answered %q", took, got)
			}
			time.Sleep(time.Minute) // until the handler has returned
		})
	}
}

func TestPanic(t *testing.T) {
	var log bytes.Buffer
	s := newTestServer()
	s.log = newLogger(&log, true)
	s.public("GET /panic", func(http.ResponseWriter, *http.Request) error { panic("a secret") })
	s.public("GET /late", func(w http.ResponseWriter, _ *http.Request) error {
		writeJSON(w, 200, "done")
		panic("a secret")
	})
	c := newClient(t, s)
	c.play(`
		> GET /panic
		< 500
		{"reason":"something went wrong on our side"}
		> GET /late
		< 200
		"done"
		> GET /healthz
		< 200
	`)
	if got := log.String(); strings.Count(got, "level=ERROR") != 2 || strings.Count(got, "\n") != 2 || !strings.Contains(got, "a secret") || !strings.Contains(got, "handlers_test.go") {
		t.Errorf("the log does not say in one line each what panicked:\n%s", got)
	}
}

// One line for each request, which no input can forge, and no secret in it.
func TestLog(t *testing.T) {
	var log bytes.Buffer
	s := newTestServer()
	s.log = newLogger(&log, false)
	c := newClient(t, s)
	c.play(signUp)
	c.play(`
		> DELETE /access-tokens?refresh_token=$refresh
		> X-Access-Token: $jwt
		< 204
		> POST /access-tokens
		{"email":"jack@test.com","password":"the-Secret-124"}
		< 400
		> GET /a%0aevil=1%20"b"%1b[31m?secret=the-Secret-123
		< 404
	`)
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	want := []string{
		`level=INFO msg=request method=POST path=/users status=201 duration=\S+ id=\w+-1`,
		`level=INFO msg=request method=DELETE path=/access-tokens status=204 duration=\S+ id=\w+-2`,
		`level=WARN msg=request method=POST path=/access-tokens status=400 duration=\S+ id=\w+-3 error="wrong e-mail or password"`,
		`level=INFO msg=request method=GET path="/a\\nevil=1 \\"b\\"\\x1b\[31m" status=404 duration=\S+ id=\w+-4`,
	}
	if len(lines) != len(want) {
		t.Fatalf("%d lines, want %d:\n%s", len(lines), len(want), log.String())
	}
	for n, line := range lines {
		if !regexp.MustCompile(`^time=\S+ ` + want[n] + `$`).MatchString(line) {
			t.Errorf("got  %s\nwant %s", line, want[n])
		}
	}
	for _, secret := range []string{"the-Secret", c.names["jwt"], c.names["refresh"]} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log holds %q", secret)
		}
	}

	log.Reset()
	s.log = newLogger(&log, true)
	c.play(`
		> GET /healthz
		< 200
		> GET /nowhere
		< 404
		> POST /access-tokens
		{"email":"jack@test.com","password":"the-Secret-124"}
		< 400
	`)
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "status=400") {
		t.Errorf("quiet, the log is\n%s", got)
	}
}

// The command:

// The command in an empty folder: what it says, what it leaves there, that all
// is as it was when it is started again, and what is different in memory.
func TestCommand(t *testing.T) {
	// start runs it; stop ends it, and returns all that it said.
	start := func(flags ...string) (c *client, stop func() string) {
		ctx, cancel := context.WithCancel(t.Context())
		out, stderr, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer stderr.Close()
			if err := run(ctx, append(flags, "-addr", "localhost:0"), stderr); err != nil {
				t.Error(err)
			}
		}()
		lines, said := bufio.NewReader(out), ""
		stop = func() string {
			cancel()
			said += string(must(io.ReadAll(lines)))
			return said
		}
		t.Cleanup(func() { stop() })
		for {
			line, err := lines.ReadString('\n')
			said += line
			if url := regexp.MustCompile(`at (http:.*)`).FindStringSubmatch(line); url != nil {
				return &client{t, url[1], http.DefaultTransport, "*", make(map[string]string)}, stop
			} else if err != nil {
				t.Fatalf("it does not start:\n%s", said)
			}
		}
	}

	t.Chdir(t.TempDir())
	c, stop := start()
	c.play(signUp)
	for impact := range 3 {
		c.expect("201", "POST /ideas", fmt.Sprintf(`{"content":"a","impact":%d,"ease":1,"confidence":1}`, impact+1), withToken)
	}
	before := c.send("GET /ideas", "", withToken).body
	want := regexp.MustCompile(`^Idea Pool is at (http://127\.0\.0\.1:\d+)
  data: ideapool.json
  key:  ideapool.pem
Try it:
  curl http://127\.0\.0\.1:\d+/users -d email=me@example.org -d name=Me -d password=the-Secret-123
(?s:.*)\nIdea Pool has stopped.
$`)
	if said := stop(); !want.MatchString(said) {
		t.Errorf("it says\n%s\nwant\n%s", said, want)
	}
	for _, file := range must(os.ReadDir(".")) {
		if info := must(file.Info()); runtime.GOOS != "windows" && info.Mode() != 0o600 {
			t.Errorf("%s has mode %v", file.Name(), info.Mode())
		}
		for _, secret := range []string{"the-Secret", c.names["jwt"], c.names["refresh"]} {
			if bytes.Contains(must(os.ReadFile(file.Name())), []byte(secret)) {
				t.Errorf("%s holds %s", file.Name(), secret)
			}
		}
	}

	names := c.names
	c, stop = start("-quiet")
	c.names = names
	if after := c.send("GET /ideas", "", withToken).body; after != before || strings.Count(after, "content") != 3 {
		t.Errorf("the list was\n%s\nand is\n%s", before, after)
	}
	c.play(`
		> POST /access-tokens/refresh
		{"refresh_token":"$refresh"}
		< 200
		> POST /access-tokens
		{"email":"jack@test.com","password":"the-Secret-123"}
		< 201
	`)
	stop()

	// With everything in memory it makes its key, and no other file. The second
	// time others can read the key, and so make tokens.
	t.Chdir(t.TempDir())
	_, stop = start("-data", "")
	stop()
	os.Chmod("ideapool.pem", 0o644)
	c, stop = start("-data", "")
	c.play(signUp)
	for _, test := range []struct{ size, want int }{{15 << 10, 401}, {17 << 10, 431}} {
		r := must(http.NewRequest("GET", c.url+"/me", nil))
		r.Header.Set("X", strings.Repeat("x", test.size))
		resp := must(c.network.RoundTrip(r))
		if resp.Body.Close(); resp.StatusCode != test.want {
			t.Errorf("a header of %d bytes: %s, want %d", test.size, resp.Status, test.want)
		}
	}
	if said := stop(); runtime.GOOS != "windows" && !regexp.MustCompile("level=WARN .*ideapool.pem").MatchString(said) {
		t.Errorf("no warning of the key in\n%s", said)
	}
	if files := must(os.ReadDir(".")); len(files) != 1 || files[0].Name() != "ideapool.pem" {
		t.Errorf("it leaves %v", files)
	}
}

// Whatever is wrong at the start is one line that names the flag or the file,
// and changes no file.
func TestBadStarts(t *testing.T) {
	busy, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	t.Chdir(t.TempDir())
	os.Mkdir("folder", 0o700)
	os.WriteFile("garbage", []byte("garbage"), 0o600)
	folder := func() map[string]string {
		files := make(map[string]string)
		for _, file := range must(os.ReadDir(".")) {
			data, _ := os.ReadFile(file.Name()) // nothing, if it is a folder
			files[file.Name()] = string(data)
		}
		maps.DeleteFunc(files, func(name, _ string) bool { return strings.HasSuffix(name, ".lock") })
		return files
	}
	before := folder()
	stopped, stop := context.WithCancel(t.Context()) // what starts all the same must stop at once
	stop()
	for _, test := range []struct {
		args string
		want string
	}{
		{"-nope", "flag provided but not defined: -nope"},
		{"-access-ttl ten", `invalid value "ten" for flag -access-ttl: time: invalid duration "ten"`},
		{"-access-ttl 999ms", `invalid value "999ms" for flag -access-ttl: must be 1s or more`},
		{"-refresh-ttl -1h", `invalid value "-1h" for flag -refresh-ttl: must be 1s or more`},
		{"-cors-origin example.org", `invalid value "example.org" for flag -cors-origin: must be '[*]', none, or an origin such as https://example.org`},
		{"-cors-origin https://Example.org", `invalid value "https://Example.org" for flag -cors-origin: must be '[*]', none, or an origin such as https://example.org`},
		{"-cors-origin https://example.org/", `invalid value "https://example.org/" for flag -cors-origin: must be '[*]', none, or an origin such as https://example.org`},
		{"serve", `unexpected argument "serve"`},
		{"-key " + must(filepath.Abs("ideas")) + " -data ideas", "flag -key needs a file of its own"},
		{"-key= -data ideas", "flag -key needs a file of its own"},

		{"-addr " + busy.Addr().String(), "-addr " + busy.Addr().String() + ": .* in use"},
		{"-addr nonsense", "-addr nonsense: .* missing port"},
		{"-key garbage", "-key garbage: is not PEM"},
		{"-key folder", "-key folder: "},
		{"-key missing/key.pem", "-key missing/key.pem: "},
		{"-data garbage", "-data garbage: .*garbage: is damaged"},
		{"-data folder", "-data folder: "},
		{"-data missing/data", "-data missing/data: "},
	} {
		var stderr bytes.Buffer
		args := []string{"-addr", "localhost:0", "-data", ""}
		if !strings.HasPrefix(test.args, "-key") {
			args = append(args, "-key", "unused.pem")
		}
		err := run(stopped, append(args, strings.Fields(test.args)...), &stderr)
		line, rest, _ := strings.Cut(stderr.String(), "\n")
		switch {
		case err == nil:
			t.Errorf("%s: starts", test.args)
		case errors.Is(err, errUsage) == strings.HasPrefix(test.want, "-"):
			t.Errorf("%s: %v", test.args, err)
		case errors.Is(err, errUsage) && rest != usage:
			t.Errorf("%s: is not followed by the usage, but\n%s", test.args, rest)
		case !errors.Is(err, errUsage):
			line = err.Error()
		}
		if !regexp.MustCompile("^"+test.want).MatchString(line) || strings.Contains(line, "\n") {
			t.Errorf("%s: says\n%s\nwant\n%s", test.args, line, test.want)
		}
		if after := folder(); !maps.Equal(after, before) {
			t.Errorf("%s: leaves %v, was %v", test.args, after, before)
		}
	}
}

func TestUsage(t *testing.T) {
	var stderr bytes.Buffer
	if err := run(t.Context(), []string{"-h"}, &stderr); !errors.Is(err, flag.ErrHelp) || stderr.String() != usage {
		t.Errorf("-h: %v\n%s", err, &stderr)
	}
	for argument, status := range map[string]int{"-h": 0, "-nope": 2} {
		command := exec.Command(os.Args[0], argument)
		command.Env = append(os.Environ(), serveEnv+"=1")
		if command.Run(); command.ProcessState.ExitCode() != status {
			t.Errorf("%s: %v, want status %d", argument, command.ProcessState, status)
		}
	}
	lines := strings.Split(usage, "\n")
	for _, line := range lines {
		if len(line) > 80 || len(lines) > 24 {
			t.Errorf("does not fit a screen: %s", line)
		}
	}
	for _, want := range []string{
		"-addr HOST:PORT", "(localhost:8080)", "-data FILE", "(ideapool.json)", "-key FILE", "(ideapool.pem)",
		"-access-ttl TIME", "(10m)", "-refresh-ttl TIME", "(720h)", "-cors-origin ORIGIN", "('*')", "-quiet",
	} {
		if !strings.Contains(usage, want) {
			t.Errorf("the usage does not tell of %s", want)
		}
	}
	o, err := parseFlags(nil, io.Discard)
	if want := (options{"localhost:8080", "ideapool.json", "ideapool.pem", 10 * time.Minute, 720 * time.Hour, "*", false}); err != nil || o != want {
		t.Errorf("without flags: %+v, want %+v", o, want)
	}
}

// Fuzzing and benchmarks:

// No body, query, header or path gives a 5xx, a redirect or an answer that is
// not ours.
func FuzzRequest(f *testing.F) {
	for _, route := range allRoutes {
		method, path, _ := strings.Cut(route, " ")
		f.Add(method, path, "application/json", `{"content":"a","impact":"8","ease":9,"confidence":10}`)
		f.Add(method, path+"?page=2", "application/x-www-form-urlencoded", "refresh_token=a%00&email=a%40b.c")
	}
	f.Add("CONNECT", "/ideas/../me", "", "[]")
	f.Add("GET", "*", "", "")
	s := newTestServer()
	jack := newClient(f, s)
	jack.play(signUp)
	token := jack.names["jwt"]
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
			if a := c.read(r, w.Result()); a.StatusCode >= 500 && a.StatusCode != 503 || a.StatusCode/100 == 3 {
				t.Errorf("%s %s: %s", method, path, a.Status)
			}
		}
	})
}

// Text comes back as it was sent, trimmed, or is refused.
func FuzzText(f *testing.F) {
	for _, s := range []string{"a", " é\n", "\u0000", "\ufffd", "<&>", "\u2028", "a\xff", `"\`, "\u00a0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		encoded, _ := json.Marshal(s)
		forms := map[string]string{
			"application/json":                  `{"content":` + string(encoded) + `}`,
			"application/x-www-form-urlencoded": url.Values{"content": {s}}.Encode(),
		}
		for contentType, body := range forms {
			r := httptest.NewRequest("POST", "/ideas", strings.NewReader(body))
			r.Header.Set("Content-Type", contentType)
			in := readInput(r)
			if got := in.text("content", 255); in.err() == nil && got != strings.TrimSpace(s) {
				t.Errorf("%q as %s comes back as %q", s, contentType, got)
			}
		}
	})
}

// Each scenario stands beside a bare net/http handler that sends the same bytes
// and does the least that they take.
func BenchmarkRequests(b *testing.B) {
	s := newTestServer()
	s.store = mustStart(b, scratch(b), nil)
	c := newClient(b, s)
	c.play(signUp)
	const content = `{"content":"the-content","impact":8,"ease":8,"confidence":8}`
	for range 200 {
		c.names["id"] = member(c.send("POST /ideas", content, withToken).body, "id")
	}
	decode := func(r *http.Request) {
		var i idea
		if err := json.NewDecoder(r.Body).Decode(&i); err != nil {
			b.Error(err)
		}
		json.Marshal(i)
	}
	sign := func(*http.Request) { must(s.tokens.sign(claims{})) }
	hashAndSign := func(*http.Request) { isPassword("", noPassword); sign(nil) }
	lists := slices.Repeat([]string{"GET /ideas"}, 8)
	for _, bench := range []struct {
		name   string
		conns  int
		least  func(*http.Request) // that a body takes
		body   string              // of each POST and PUT
		routes []string            // in turn
	}{
		{"me", 16, nil, "", []string{"GET /me"}},
		{"first page", 16, nil, "", []string{"GET /ideas?page=1"}},
		{"last page", 16, nil, "", []string{fmt.Sprintf("GET /ideas?page=%d", pagesFor(200))}},
		{"create", 64, decode, content, []string{"POST /ideas"}},
		{"update", 64, decode, content, []string{"PUT /ideas/$id"}},
		{"mixed", 64, decode, content, slices.Concat(lists, []string{"POST /ideas", "PUT /ideas/$id"}, lists, []string{"POST /ideas", "DELETE /ideas/$id"})},
		{"refresh", 16, sign, c.expand(`{"refresh_token":"$refresh"}`), []string{"POST /access-tokens/refresh"}},
		{"log in", 1, hashAndSign, `{"email":"jack@test.com","password":"the-Secret-123"}`, []string{"POST /access-tokens"}},
	} {
		var requests []string
		answers := make(map[string]answer) // by method
		for _, route := range bench.routes {
			method, _, _ := strings.Cut(route, " ")
			body := ""
			if method == "POST" || method == "PUT" {
				body = bench.body
			}
			answers[method] = c.send(route, body, withToken)
			answers[method].Header.Del("Date") // net/http adds both
			answers[method].Header.Del("Content-Length")
			c.names["id"] = cmp.Or(member(answers[method].body, "id"), c.names["id"])
			requests = append(requests, fmt.Sprintf("%s HTTP/1.1\r\nHost: x\r\nX-Access-Token: %s\r\nContent-Length: %d\r\n\r\n%s",
				route, c.names["jwt"], len(body), body))
		}
		bare := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ContentLength > 0 {
				bench.least(r)
			}
			maps.Copy(w.Header(), answers[r.Method].Header)
			w.WriteHeader(answers[r.Method].StatusCode)
			io.WriteString(w, answers[r.Method].body)
		})
		l := load{Conns: bench.conns, Requests: requests, ID: c.names["id"]}
		b.Run(bench.name+"/bare", func(b *testing.B) { measure(b, bare, l) })
		b.Run(bench.name+"/ours", func(b *testing.B) { measure(b, s, l) })
	}
}

// BenchmarkGate asks for GET /me while 48 people log in all the time.
func BenchmarkGate(b *testing.B) {
	for name, hashing := range map[string]gate{"gate": newTestServer().hashing, "no gate": newGate(48, 0)} {
		b.Run(name, func(b *testing.B) {
			s := newTestServer()
			c := newClient(b, s)
			c.play(signUp)
			s.hashing = hashing
			ctx, cancel := context.WithCancel(b.Context())
			var people sync.WaitGroup
			defer people.Wait()
			defer cancel()
			for range 48 {
				people.Go(func() {
					for ctx.Err() == nil {
						c.expect("201", "POST /access-tokens", `{"email":"jack@test.com","password":"the-Secret-123"}`)
					}
				})
			}
			measure(b, s, load{Conns: 16, Requests: []string{c.expand("GET /me HTTP/1.1\r\nHost: x\r\nX-Access-Token: $jwt\r\n\r\n")}})
		})
	}
}

// A load is what a client in a process of its own asks for, over and over.
type load struct {
	Address  string
	Conns    int
	Requests []string // in turn
	ID       string   // of the first idea; then it is the last that was made
}

const loadEnv = "IDEAPOOL_TEST_LOAD"

// measure reports what a request costs this process.
func measure(b *testing.B, h http.Handler, l load) {
	server := httptest.NewUnstartedServer(h)
	server.Config.ReadTimeout, server.Config.WriteTimeout = time.Minute, time.Minute
	server.Start()
	defer server.Close()
	l.Address = server.Listener.Addr().String()
	client := exec.Command(os.Args[0])
	client.Env = append(os.Environ(), loadEnv+"="+string(must(json.Marshal(l))))
	client.Stderr = os.Stderr
	counts := bufio.NewScanner(must(client.StdoutPipe()))
	if err := client.Start(); err != nil {
		b.Fatal(err)
	}
	defer client.Wait()
	defer client.Process.Kill()

	counts.Scan() // it has warmed up
	b.ReportAllocs()
	before, requests := used(), 0
	for b.Loop() {
		if !counts.Scan() {
			b.Fatal("the client has failed")
		}
		requests += must(strconv.Atoi(counts.Text()))
	}
	for unit, after := range used() {
		b.ReportMetric((after-before[unit])/float64(requests), unit+"/op")
	}
}

// used is the time, memory and CPU time that have gone by so far.
func used() map[string]float64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	u := map[string]float64{"ns": float64(time.Now().UnixNano()), "B": float64(m.TotalAlloc), "allocs": float64(m.Mallocs)}
	if stat, err := os.ReadFile("/proc/self/stat"); err == nil { // see proc_pid_stat(5); Linux only
		_, fields, _ := strings.Cut(string(stat), ") ")
		for _, ticks := range strings.Fields(fields)[11:13] { // of 10 ms, in user mode and in the kernel
			u["CPU-ns"] += 1e7 * must(strconv.ParseFloat(ticks, 64))
		}
	}
	return u
}

// run is the client. It says every 10 ms how many requests were answered.
func (l load) run() {
	ids := slices.Repeat([]string{l.ID}, l.Conns)
	var out []net.Conn
	var in []*bufio.Reader
	for n := range l.Conns {
		out = append(out, must(net.Dial("tcp", l.Address)))
		in = append(in, bufio.NewReader(out[n]))
	}
	answered, said := 0, time.Now()
	for turn := 0; ; turn++ {
		for n, conn := range out {
			request := l.Requests[(turn+n%8)%len(l.Requests)] // not all the same at a time
			io.WriteString(conn, strings.Replace(request, "$id", ids[n], 1))
		}
		for n, answers := range in {
			resp := must(http.ReadResponse(answers, nil))
			body := must(io.ReadAll(resp.Body))
			if resp.StatusCode >= 300 {
				panic(fmt.Sprint(resp, string(body)))
			}
			if resp.StatusCode == http.StatusCreated {
				ids[n] = member(string(body), "id")
			}
		}
		if answered += len(in); time.Since(said) > 10*time.Millisecond {
			fmt.Println(answered)
			answered, said = 0, time.Now()
		}
	}
}

// Helpers. More of them (must, member, atOnce, mustStart, scratch, quiet, rfcKey)
// are in the other tests.

// newTestServer makes a server with everything in memory.
func newTestServer(flags ...string) *server {
	return newServer(must(parseFlags(flags, io.Discard)), rfcKey(), must(openStore("", quiet)), quiet)
}

// A client talks to a server, in HTTP.
type client struct {
	t       testing.TB
	url     string
	network http.RoundTripper
	origin  string            // whose pages every answer must let in
	names   map[string]string // what was named in transcripts
}

// newClient makes one whose network is in memory, with the handler behind it.
func newClient(t testing.TB, h http.Handler) *client {
	listener, server := make(pipes), &http.Server{Handler: h}
	go server.Serve(listener)
	network := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return listener.dial(), nil }}
	t.Cleanup(func() { network.CloseIdleConnections(); server.Close() })
	return &client{t, "http://test", network, "*", make(map[string]string)}
}

// send sends a request, such as "GET /me", with headers such as "Name: value".
func (c *client) send(request, body string, headers ...string) answer {
	c.t.Helper()
	method, target, _ := strings.Cut(c.expand(request), " ")
	r := must(http.NewRequest(method, c.url+target, strings.NewReader(c.expand(body))))
	for _, header := range headers {
		name, value, _ := strings.Cut(c.expand(header), ":")
		r.Header.Add(name, strings.TrimSpace(value))
	}
	resp, err := c.network.RoundTrip(r)
	if err != nil {
		c.t.Fatalf("%s: %v", request, err)
	}
	return c.read(r, resp)
}

// read reads an answer, and checks what is true of every one.
func (c *client) read(r *http.Request, resp *http.Response) answer {
	c.t.Helper()
	a := answer{resp, string(must(io.ReadAll(resp.Body))), ""}
	a.reason = member(a.body, "reason")
	for rule, kept := range everyAnswer(a, r.Method, c.origin) {
		if !kept {
			c.t.Errorf("%s %s: %s, without %s:\n%v\n%s", r.Method, r.URL, a.Status, rule, a.Header, a.body)
		}
	}
	return a
}

// An answer is a response that was read.
type answer struct {
	*http.Response
	body, reason string
}

// line is what the answer has in the place of a line of a transcript.
func (a answer) line(want string) string {
	name, _, isHeader := strings.Cut(want, ":")
	switch {
	case !strings.HasPrefix(want, "< "):
		return a.body
	case isHeader:
		return strings.TrimSpace(name + ": " + a.Header.Get(name[2:]))
	}
	return fmt.Sprint("< ", a.StatusCode)
}

// play plays a transcript, and compares what it has of each answer.
func (c *client) play(transcript string) {
	c.t.Helper()
	_, _, first, _ := runtime.Caller(1)
	for _, step := range steps(transcript) {
		a := c.send(step.request, step.body, step.headers...)
		report, good := "", true
		for _, want := range step.want {
			want, got := c.expand(want), a.line(want)
			good = c.match(want, got) && good
			report += fmt.Sprintf("want %s\n got %s\n", want, got)
		}
		if !good {
			c.t.Fatalf("line %d:\n> %s %q\n%s\n%s", first+step.line, step.request, step.headers, step.body, report)
		}
	}
}

// A step is a request, and the lines of its answer.
type step struct {
	line          int // in the transcript
	request, body string
	headers, want []string
}

func steps(transcript string) (all []step) {
	for n, line := range strings.Split(transcript, "\n") {
		line = strings.TrimSpace(line)
		sent, isSent := strings.CutPrefix(line, "> ")
		last := len(all) - 1
		switch {
		case line == "", line[0] == '#':
		case isSent && strings.Contains(sent, " /"):
			all = append(all, step{line: n, request: sent})
		case isSent:
			all[last].headers = append(all[last].headers, sent)
		case line[0] == '<', all[last].want != nil:
			all[last].want = append(all[last].want, line)
		default:
			all[last].body = line
			all[last].headers = append(all[last].headers, "Content-Type: application/json")
		}
	}
	return all
}

// match compares a line with a wanted one, whose new $names it takes over.
func (c *client) match(want, got string) bool {
	unnamed := regexp.MustCompile(`\\\$(\w+)`).ReplaceAllString(regexp.QuoteMeta(want), `(?P<$1>[^",}\s]+)`)
	form := regexp.MustCompile("^" + unnamed + "$")
	values := form.FindStringSubmatch(got)
	for n, name := range form.SubexpNames() {
		if values != nil && name != "" {
			c.names[name] = values[n]
		}
	}
	return values != nil
}

// expand puts what was named in the place of the names.
func (c *client) expand(s string) string {
	return os.Expand(s, func(name string) string { return cmp.Or(c.names[name], "$"+name) })
}

// expect sends a request too, and wants "201", or "404 you have no such idea".
func (c *client) expect(want, request, body string, headers ...string) {
	c.t.Helper()
	a := c.send(request, body, headers...)
	if got := strings.TrimSpace(fmt.Sprint(a.StatusCode, " ", a.reason)); got != want {
		c.t.Errorf("%s %q\n%.100s\nwant %s\n got %s", request, headers, body, want, got)
	}
}

// pipes are a network in memory, the only one whose time is synctest's.
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
