package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// This file holds what several test files use: flags, a server and its client, the
// player of transcripts, a key, and files. A helper that calls t.Fatal must run in
// the goroutine of the test. Those that may run in any goroutine say so.

var (
	long     = flag.Bool("long", false, "kill the server many times, which takes minutes")
	update   = flag.Bool("update", false, "write testdata/ideapool.json anew")
	exercise = flag.String("exercise", "", "the `number` of an exercise that must pass, or none if all must fail")
)

// serveEnv is an environment variable that makes the test binary be the command.
const serveEnv = "IDEAPOOL_TEST_SERVE"

// TestMain runs the tests, or the command for tests that start it as a process.
func TestMain(m *testing.M) {
	if os.Getenv(serveEnv) == "" {
		os.Exit(m.Run())
	}
	main()
}

// The bodies of the most frequent requests. A required field that is new goes into
// anIdea, which transcripts use as $an_idea.
const (
	anIdea      = `{"content":"the-content","impact":8,"ease":8,"confidence":8}`
	jacksSignUp = `{"email":"jack@test.com","name":"Jack","password":"the-Secret-123"}`
	jacksLogin  = `{"email":"jack@test.com","password":"the-Secret-123"}`
)

// withToken is a header with the access token that client.signUp has kept.
const withToken = "X-Access-Token: $jwt"

// quiet logs nothing.
var quiet = slog.New(slog.DiscardHandler)

// newTestServer returns a server with the given flags of the command. Without any,
// it keeps everything in memory and signs with rfcKey. Its hashes are cheap.
func newTestServer(t testing.TB, flags ...string) *server {
	t.Helper()
	o, err := parseFlags(append([]string{"-data=", "-key", rfcKeyFile}, flags...), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(o, testKey(t, o.key), startStore(t, o.data, realDisk), quiet)
	s.hashCost = argonCost{memory: 64, passes: 1, threads: 1}
	return s
}

// startStore opens and starts a store.
func startStore(t testing.TB, path string, d disk) *store {
	t.Helper()
	s := openTestStore(t, path, d)
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	return s
}

// openTestStore opens a store that is abandoned at the end of the test.
func openTestStore(t testing.TB, path string, d disk) *store {
	t.Helper()
	s, err := openStore(path, d, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { abandon(s) })
	return s
}

// abandon ends the writer and leaves FILE as it is, as the end of a process would.
func abandon(s *store) {
	select {
	case <-s.stopping:
	default:
		close(s.stopping)
	}
	s.running.Wait()
	s.release()
}

// A client sends requests to a server. In what it sends, a name such as $jwt stands
// for a value.
type client struct {
	t         testing.TB
	url       string
	transport http.RoundTripper
	origin    string            // of Access-Control-Allow-Origin in every response
	names     map[string]string // the values, by name
}

// newClient returns a client of a handler behind a network in memory. The header
// From sets the address from which a request seems to come.
func newClient(t testing.TB, h http.Handler) *client {
	network := make(pipes)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.RemoteAddr = cmp.Or(r.Header.Get("From"), "192.0.2.1:1234")
		h.ServeHTTP(w, r)
	})}
	go srv.Serve(network)
	dial := func(context.Context, string, string) (net.Conn, error) { return network.dial(), nil }
	transport := &http.Transport{DialContext: dial}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		srv.Close()
	})
	return &client{t: t, url: "http://test", transport: transport, origin: "*", names: make(map[string]string)}
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

// expect checks a response against "201" or "404 you have no such idea". It may run
// in any goroutine.
func (c *client) expect(request, body, want string, headers ...string) {
	c.t.Helper()
	if got := c.send(request, body, headers...).summary(); got != want {
		c.t.Errorf("%s %q\n%.100s\n got %s\nwant %s", request, headers, body, got, want)
	}
}

// send sends a request, such as "GET /me", with headers such as "Name: value". A
// body is JSON unless they say otherwise. It may run in any goroutine: if the
// request fails, it reports the error, and returns a response with the status 0.
func (c *client) send(request, body string, headers ...string) testResponse {
	c.t.Helper()
	resp, err := c.try(request, body, headers...)
	if err != nil {
		c.t.Errorf("%s: %v", request, err)
	}
	return resp
}

// try is send for those who look at the error themselves.
func (c *client) try(request, body string, headers ...string) (testResponse, error) {
	failed := testResponse{Response: new(http.Response)}
	method, target, _ := strings.Cut(c.expand(request), " ")
	r, err := http.NewRequest(method, c.url+target, strings.NewReader(c.expand(body)))
	if err != nil {
		return failed, err
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(c.expand(header), ":")
		r.Header.Add(name, strings.TrimSpace(value))
	}
	if body != "" && r.Header["Content-Type"] == nil {
		r.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.transport.RoundTrip(r)
	if err != nil {
		return failed, err
	}
	return readResponse(resp, method, c.origin)
}

var usedName = regexp.MustCompile(`\$\w+(:=)?`)

// expand replaces names by their values, except where they are set.
func (c *client) expand(text string) string {
	return usedName.ReplaceAllStringFunc(text, func(name string) string {
		value, known := c.names[name[1:]]
		if strings.HasSuffix(name, ":=") {
			return name
		}
		if !known {
			c.t.Errorf("%s has no value; an earlier response must set it, by %s:=", name, name)
		}
		return value
	})
}

// A testResponse is a response whose body has been read.
type testResponse struct {
	*http.Response
	body, reason string
}

// summary is the status and the reason, if there is one.
func (r testResponse) summary() string {
	return strings.TrimSpace(fmt.Sprint(r.StatusCode, " ", r.reason))
}

// readResponse reads a response, and checks what is true of every response.
func readResponse(resp *http.Response, method, origin string) (testResponse, error) {
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	read := testResponse{resp, string(body), member(string(body), "reason")}
	for rule, holds := range rules(read, method, origin) {
		if !holds {
			err = errors.Join(err, fmt.Errorf("this is not true of the response: %s\n%v\n%s", rule, resp, body))
		}
	}
	return read, err
}

// rules says for each rule for every response whether it holds.
func rules(resp testResponse, method, origin string) map[string]bool {
	has := func(name, value string) bool { return resp.Header.Get(name) == value }
	status, body := resp.StatusCode, resp.body
	const contentType = "application/json; charset=utf-8"
	var problem struct{ Fields map[string]string }
	json.Unmarshal([]byte(body), &problem)
	return map[string]bool{
		"X-Content-Type-Options is nosniff":             has("X-Content-Type-Options", "nosniff"),
		"X-Frame-Options is SAMEORIGIN":                 has("X-Frame-Options", "SAMEORIGIN"),
		"Cache-Control is no-store":                     has("Cache-Control", "no-store"),
		"there is an X-Request-Id":                      !has("X-Request-Id", ""),
		"Access-Control-Allow-Origin is " + origin:      has("Access-Control-Allow-Origin", origin),
		"Vary is Origin if one origin is allowed":       has("Vary", "Origin") == (origin != "*" && origin != ""),
		"a 204 has neither a body nor a Content-Type":   status != 204 || body == "" && has("Content-Type", ""),
		"others have JSON":                              status == 204 || has("Content-Type", contentType),
		"nothing comes in chunks":                       len(resp.TransferEncoding) == 0,
		"an error has a reason":                         status < 400 || resp.reason != "" || method == "HEAD" && body == "",
		"only an error has a reason":                    status >= 400 || resp.reason == "",
		"no body has a numeric status":                  !regexp.MustCompile(`"status":\s*[-\d]`).MatchString(body),
		"the reason of a 422 names the fields":          status != 422 || resp.reason == invalidFields(problem.Fields).Reason,
		"only a 422 has fields":                         status == 422 || problem.Fields == nil,
		"a 401 and nothing else has WWW-Authenticate":   has("WWW-Authenticate", "Bearer") == (status == 401),
		"a 405 and nothing else has Allow":              has("Allow", "") == (status != 405),
		"a 429, a 503 and nothing else has Retry-After": has("Retry-After", "") == (status != 429 && status != 503),
	}
}

// member returns a member of a JSON object that is text, or "".
func member(object, name string) string {
	var members map[string]any
	json.Unmarshal([]byte(object), &members)
	text, _ := members[name].(string)
	return text
}

// Transcripts:

// A step of a transcript is a command, or a request and the lines of its response.
type step struct {
	line    int
	marked  bool // see TestExercise
	command string
	request string
	headers []string
	bodies  []string // the request is sent with each of them
	want    []string
}

const mark = "# Fails until the exercise is solved."

// readTranscript reads the steps of a transcript. See document.txt for its format.
func readTranscript(t testing.TB, path string) (steps []*step) {
	t.Helper()
	marked, last := false, new(step)
	for n, line := range strings.Split(readFile(t, path), "\n") {
		command, isCommand := strings.CutPrefix(line, "$ ")
		sent, isSent := strings.CutPrefix(line, "> ")
		switch {
		case line == "", line[0] == '#':
			marked = marked || line == mark
		case isCommand:
			steps = append(steps, &step{line: n + 1, command: command})
		case isSent && strings.Contains(sent, " /"):
			last = &step{line: n + 1, marked: marked, request: sent}
			steps, marked = append(steps, last), false
		case isSent:
			last.headers = append(last.headers, sent)
		case line[0] == '<', last.want != nil:
			last.want = append(last.want, line)
		default:
			last.bodies = append(last.bodies, line)
		}
	}
	return steps
}

// play plays a transcript up to the first step that fails, and returns this step. It
// must be called in a synctest bubble.
func play(t *testing.T, path string) (failed *step, err error) {
	time.Sleep(time.Until(time.Unix(1553657927, 0))) // the time in the document's examples
	c, times := newClient(t, newTestServer(t)), 1
	c.names["an_idea"], c.names["dir"] = anIdea, t.TempDir()
	for _, s := range readTranscript(t, path) {
		name, argument, _ := strings.Cut(s.command, " ")
		switch name {
		case "":
			err = c.take(s, times)
			times = 1
		case "repeat":
			times, err = strconv.Atoi(argument)
		case "sleep":
			var duration time.Duration
			duration, err = time.ParseDuration(argument)
			time.Sleep(duration)
		case "ideapool":
			err = c.restart(t, argument)
		default:
			err = fmt.Errorf("there is no command %s", name)
		}
		if err != nil {
			return s, fmt.Errorf("%s:%d: %w", path, s.line, err)
		}
	}
	return nil, nil
}

// restart connects the client with a new server. Its files in $dir are as a kill would
// leave them.
func (c *client) restart(t *testing.T, flags string) error {
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(c.names["dir"])); err != nil {
		return err
	}
	c.names["dir"] = dir
	s := newTestServer(t, strings.Fields(c.expand(flags))...)
	c.transport, c.origin = newClient(t, s).transport, strings.TrimPrefix(s.options.corsOrigin, "none")
	return nil
}

// take sends the requests of a step, and compares the responses.
func (c *client) take(s *step, times int) error {
	if s.bodies == nil {
		s.bodies = []string{""}
	}
	for _, body := range slices.Repeat(s.bodies, times) {
		resp, err := c.try(s.request, body, s.headers...)
		if err != nil {
			return fmt.Errorf("%s: %w", s.request, err)
		}
		var got []string
		for _, line := range s.want {
			name, _, isHeader := strings.Cut(line, ":")
			switch {
			case line[0] != '<':
				got = append(got, resp.body)
			case isHeader:
				got = append(got, strings.TrimSpace(name+": "+resp.Header.Get(name[2:])))
			default:
				got = append(got, fmt.Sprint("< ", resp.StatusCode))
			}
		}
		if err := c.match(strings.Join(s.want, "\n"), strings.Join(got, "\n")); err != nil {
			return fmt.Errorf("%s %s\n%w\nThe response has the body %s", s.request, body, err, resp.body)
		}
	}
	return nil
}

var setName = regexp.MustCompile(`\\\$(\w+):=`) // after regexp.QuoteMeta

// match compares a text with the wanted one, and sets the names that come with := in
// that.
func (c *client) match(want, got string) error {
	want = c.expand(want)
	pattern := setName.ReplaceAllString(regexp.QuoteMeta(want), `(?P<$1>[^",{}\s]+)`)
	re, err := regexp.Compile("^" + strings.ReplaceAll(pattern, "…", ".*") + "$")
	if err != nil {
		return err
	}
	values := re.FindStringSubmatch(got)
	if values == nil || want == "" {
		return fmt.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for n, name := range re.SubexpNames()[1:] {
		c.names[name] = values[n+1]
	}
	return nil
}

// Networks and goroutines:

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
	near, far := net.Pipe()
	p <- far
	return near
}

// startServing runs the server on a pipe network. It must be called in a synctest
// bubble. The returned stop ends the server and waits.
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

// exchange sends a request as it is, and checks the response, as client.expect does.
func exchange(t testing.TB, conn net.Conn, request, want string) {
	t.Helper()
	go io.WriteString(conn, request) // a pipe has no buffer
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("%.100q: %v", request, err)
	}
	body, err := io.ReadAll(resp.Body)
	got := testResponse{resp, string(body), member(string(body), "reason")}.summary()
	if err != nil || got != want {
		t.Errorf("%.100q: got %s, %v, want %s", request, got, err, want)
	}
}

// A syncBuffer is a log that several goroutines write.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// atOnce runs do in n goroutines, and waits for them.
func atOnce(n int, do func(n int)) {
	var wg sync.WaitGroup
	for n := range n {
		wg.Go(func() { do(n) })
	}
	wg.Wait()
}

// Keys and files:

// rfcKeyFile has the key of RFC 7515, appendix A.2.1.
const rfcKeyFile = "testdata/keys/rfc7515.pem"

func rfcKey(t testing.TB) *rsa.PrivateKey { return testKey(t, rfcKeyFile) }

func testKey(t testing.TB, path string) *rsa.PrivateKey {
	t.Helper()
	key, err := readKey(path)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// readFile reads a text file, to which Git may have given the line ends of Windows.
func readFile(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(data), "\r", "")
}

func writeFile(t testing.TB, path string, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o640); err != nil {
		t.Fatal(err)
	}
}

// glob returns the paths that match a pattern. There must be some.
func glob(t testing.TB, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		t.Fatalf("%s: got %q, %v, want files", pattern, paths, err)
	}
	return paths
}

// filesIn returns the names, modes, times and contents of all files in a directory,
// or of one file.
func filesIn(t testing.TB, root string) string {
	t.Helper()
	var s strings.Builder
	filepath.WalkDir(root, func(path string, file fs.DirEntry, err error) error {
		info, infoErr := os.Lstat(path)
		if err := errors.Join(err, infoErr); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&s, path, info.Mode())
		if info.Mode().IsRegular() {
			fmt.Fprintf(&s, "%v %q\n", info.ModTime(), readFile(t, path))
		}
		return nil
	})
	return s.String()
}

// symlink fails on Windows, where not everybody may create links.
func symlink(target, path string) error {
	if runtime.GOOS == "windows" {
		return errors.ErrUnsupported
	}
	return os.Symlink(target, path)
}
