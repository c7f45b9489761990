// Command ideapool is the backend of "My Idea Pool": people sign up, log in
// and keep a pool of ideas, each scored for impact, ease and confidence and
// listed by its average.
//
// A request goes from [http.Server] to [server.ServeHTTP], through the route
// list of [server.routes] to one handler. A handler reads its input, acts, and
// writes an answer, or returns an error; [response.fail] makes the answer of
// the error.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
)

const usage = `Usage: ideapool [flags]

  -addr HOST:PORT      where to listen (localhost:8080)
  -data FILE           where everything is kept (ideapool.json);
                       '' keeps it in memory only
  -key FILE            the RSA key that signs tokens, PEM (ideapool.pem);
                       made on the first start
  -access-ttl TIME     how long an access token lives (10m)
  -refresh-ttl TIME    how long a refresh token lives (720h)
  -cors-origin ORIGIN  whose web pages may call: '*' for all, one
                       https://host, or none ('*')
  -quiet               log failures only
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once

	err := run(ctx, os.Args[1:], os.Stderr)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return
	case errors.Is(err, errUsage):
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, "ideapool:", err)
	os.Exit(1)
}

// run serves until ctx ends. What can be wrong at the start is found before a
// file is changed, other than the lock: the steps that only read come first.
func run(ctx context.Context, args []string, stderr io.Writer) (err error) {
	o, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", o.addr)
	if err != nil {
		return fmt.Errorf("-addr %s: %w", o.addr, err)
	}
	defer listener.Close()

	log := newLogger(stderr, o.quiet)
	key, err := readKey(o.key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("-key %s: %w", o.key, err)
	}
	if key != nil && !isPrivate(o.key) {
		log.Warn("others can read the key, and so make tokens", "file", o.key)
	}
	store, err := openStore(o.data, log)
	if err != nil {
		return fmt.Errorf("-data %s: %w", o.data, err)
	}
	defer func() {
		if err = errors.Join(err, store.close()); err == nil {
			fmt.Fprintln(stderr, "Idea Pool has stopped.")
		}
	}()

	if key == nil {
		if key, err = makeKey(o.key); err != nil {
			return fmt.Errorf("-key %s: %w", o.key, err)
		}
	}
	if err := store.start(); err != nil {
		return fmt.Errorf("-data %s: %w", o.data, err)
	}
	greet(stderr, listener.Addr(), o)
	return serve(ctx, newServer(o, key, store, log), listener)
}

// options are the command's flags.
type options struct {
	addr, data, key       string
	accessTTL, refreshTTL time.Duration
	corsOrigin            string
	quiet                 bool
}

var errUsage = errors.New("wrong usage")

// parseFlags reads the command line. What is wrong with it is said on stderr,
// followed by the usage. The error is errUsage, and for -h also [flag.ErrHelp].
func parseFlags(args []string, stderr io.Writer) (options, error) {
	o := options{accessTTL: 10 * time.Minute, refreshTTL: 30 * 24 * time.Hour, corsOrigin: "*"}
	flags := flag.NewFlagSet("ideapool", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprint(stderr, usage) }
	flags.StringVar(&o.addr, "addr", "localhost:8080", "")
	flags.StringVar(&o.data, "data", "ideapool.json", "")
	flags.StringVar(&o.key, "key", "ideapool.pem", "")
	flags.Func("access-ttl", "", lifetime(&o.accessTTL))
	flags.Func("refresh-ttl", "", lifetime(&o.refreshTTL))
	flags.Func("cors-origin", "", origin(&o.corsOrigin))
	flags.BoolVar(&o.quiet, "quiet", false, "")

	if err := flags.Parse(args); err != nil {
		return o, errors.Join(errUsage, err)
	}
	switch {
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "unexpected argument %q\n%s", flags.Arg(0), usage)
	case o.key == "", samePath(o.key, o.data):
		fmt.Fprintf(stderr, "flag -key needs a file of its own\n%s", usage)
	default:
		return o, nil
	}
	return o, errUsage
}

func samePath(a, b string) bool {
	a, err1 := filepath.Abs(a)
	b, err2 := filepath.Abs(b)
	return a == b && err1 == nil && err2 == nil
}

// lifetime parses a token's time to live. Times are counted in whole seconds.
func lifetime(ttl *time.Duration) func(string) error {
	return func(s string) (err error) {
		if *ttl, err = time.ParseDuration(s); err == nil && *ttl < time.Second {
			err = errors.New("must be 1s or more")
		}
		return err
	}
}

// origin parses '*', none, or what a browser sends in the header Origin: scheme,
// host and port (RFC 6454 §6.2).
func origin(o *string) func(string) error {
	return func(s string) error {
		*o = s
		u, err := url.Parse(s)
		if s == "*" || s == "none" || err == nil && u.Host != "" && s == u.Scheme+"://"+strings.ToLower(u.Host) {
			return nil
		}
		return errors.New("must be '*', none, or an origin such as https://example.org")
	}
}

func newLogger(w io.Writer, quiet bool) *slog.Logger {
	level := slog.LevelInfo
	if quiet {
		level = slog.LevelWarn
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

func greet(w io.Writer, addr net.Addr, o options) {
	fmt.Fprintf(w, `Idea Pool is at http://%s
  data: %s
  key:  %s
Try it:
  curl http://%[1]s/users -d email=me@example.org -d name=Me -d password=the-Secret-123
`, addr, cmp.Or(o.data, "in memory, gone when this stops"), o.key)
}

// serve answers on listener until ctx ends, and then lets the requests under
// way finish.
func serve(ctx context.Context, s *server, listener net.Listener) error {
	const grace = 10 * time.Second
	srv := &http.Server{
		Handler:                      s,
		ReadHeaderTimeout:            5 * time.Second,
		ReadTimeout:                  10 * time.Second,
		WriteTimeout:                 30 * time.Second,
		IdleTimeout:                  2 * time.Minute,
		MaxHeaderBytes:               12 << 10, // net/http adds 4 KiB of its own: 16 in all
		DisableGeneralOptionsHandler: true,     // "OPTIONS *" is ours, like the rest
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	deadline, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if srv.Shutdown(deadline) != nil {
		srv.Close()
	}
	return nil
}

// A server is the whole API as one [http.Handler].
type server struct {
	store      *store
	tokens     *tokens
	refreshTTL time.Duration
	hashing    gate
	guesses    guesses
	log        *slog.Logger

	mux     http.ServeMux
	headers http.Header // on every answer
	cors    bool

	idPrefix string // request ids are the prefix and a count
	requests atomic.Uint64
}

func newServer(o options, key *rsa.PrivateKey, store *store, log *slog.Logger) *server {
	s := &server{
		store:      store,
		tokens:     newTokens(key, o.accessTTL),
		refreshTTL: o.refreshTTL,
		hashing:    newGate(max(1, runtime.GOMAXPROCS(0)-1), 100), // one core, if there are more, is for all else
		guesses:    guesses{made: make(map[guesser]failures)},
		log:        log,
		headers: http.Header{
			"X-Content-Type-Options": {"nosniff"},
			"X-Frame-Options":        {"SAMEORIGIN"},
			"Cache-Control":          {"no-store"}, // nearly all is private, or a credential
		},
		cors:     o.corsOrigin != "none",
		idPrefix: rand.Text()[:8] + "-",
	}
	if s.cors {
		s.headers.Set("Access-Control-Allow-Origin", o.corsOrigin)
		s.headers.Set("Access-Control-Expose-Headers", "Link, Retry-After, X-Request-Id")
	}
	if s.cors && o.corsOrigin != "*" {
		s.headers.Set("Vary", "Origin")
	}
	s.routes()
	return s
}

// routes is the API, in the order of its document.
func (s *server) routes() {
	s.public("POST /access-tokens/refresh", s.refresh)
	s.public("POST /access-tokens", s.logIn)
	s.private("DELETE /access-tokens", s.logOut)
	s.private("GET /me", s.me)
	s.private("POST /ideas", s.createIdea)
	s.private("DELETE /ideas/{id}", s.deleteIdea)
	s.private("GET /ideas", s.listIdeas)
	s.private("PUT /ideas/{id}", s.updateIdea)
	s.public("POST /users", s.signUp)

	s.public("GET /.well-known/jwks.json", s.jwks)
	s.public("GET /healthz", s.healthz)
	s.public("/", s.noRoute)
}

// A handler answers a request, or returns an error and has written nothing.
type handler func(w http.ResponseWriter, r *http.Request) error

func (s *server) public(pattern string, h handler) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			w.(*response).fail(err)
		}
	})
}

// private registers a handler for people who are logged in. It is given the
// user, so that it cannot be registered as public by mistake.
func (s *server) private(pattern string, h func(http.ResponseWriter, *http.Request, user) error) {
	s.public(pattern, func(w http.ResponseWriter, r *http.Request) error {
		u, err := s.caller(r)
		if err != nil {
			return err
		}
		return h(w, r, u)
	})
}

const maxBody = 64 << 10 // bytes

// ServeHTTP gives each answer its headers and an id, bounds the body, and logs a
// line.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	id := s.idPrefix + strconv.FormatUint(s.requests.Add(1), 10)
	maps.Copy(w.Header(), s.headers)
	w.Header().Set("X-Request-Id", id)
	if r.ContentLength != 0 {
		// Before w is wrapped: MaxBytesReader tells net/http's own writer to
		// close the connection.
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	}
	answer := &response{ResponseWriter: w}
	s.dispatch(answer, r)
	s.logRequest(r, answer, id, start)
}

// logRequest writes one line, with no query, which may hold a token.
func (s *server) logRequest(r *http.Request, answer *response, id string, start time.Time) {
	level := answer.logLevel()
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("method", r.Method),
		slog.String("path", r.URL.Path),
		slog.Int("status", answer.status),
		slog.Duration("duration", time.Since(start)),
		slog.String("id", id),
	}
	if level > slog.LevelInfo {
		attrs = append(attrs, slog.Any("error", answer.err))
	}
	s.log.LogAttrs(r.Context(), level, "request", attrs...)
}

// dispatch hands the request to its route.
func (s *server) dispatch(w *response, r *http.Request) {
	defer func() {
		if p := recover(); p != nil {
			w.fail(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
	}()
	switch {
	case s.cors && r.Method == http.MethodOptions:
		preflight(w, r)
	case r.ContentLength > maxBody:
		w.fail(errTooLarge)
	default:
		s.mux.ServeHTTP(w, tidyPath(r))
	}
}

// tidyPath serves //ideas and /ideas/ as /ideas. The mux would redirect the first,
// which browsers do not follow after a preflight, and not know the second.
func tidyPath(r *http.Request) *http.Request {
	if p := r.URL.Path; path.Clean(p) == p && p[0] == '/' && r.URL.RawPath == "" {
		return r
	}
	copied := *r
	copied.URL = &url.URL{Path: path.Clean("/" + r.URL.Path), RawQuery: r.URL.RawQuery}
	copied.RequestURI = "" // the mux refuses a request for *
	return &copied
}

// preflight answers the question that a browser asks before a request to
// another origin (https://fetch.spec.whatwg.org/#cors-preflight-fetch).
func preflight(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Access-Control-Allow-Methods", "GET, POST, PUT, DELETE")
	h.Set("Access-Control-Max-Age", "86400") // a day, in seconds
	if asked := r.Header.Values("Access-Control-Request-Headers"); len(asked) > 0 {
		h["Access-Control-Allow-Headers"] = asked
	}
	w.WriteHeader(http.StatusNoContent)
}

// noRoute distinguishes a wrong path from a wrong method, for which it sets
// Allow (RFC 9110 §15.5.6). It takes all that no other route does; the mux
// itself would answer in text.
func (s *server) noRoute(w http.ResponseWriter, r *http.Request) error {
	var allowed []string
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE"} {
		probe := &http.Request{Method: method, Host: r.Host, URL: r.URL}
		if _, pattern := s.mux.Handler(probe); pattern != "/" {
			allowed = append(allowed, method)
		}
	}
	if allowed == nil {
		return errNoRoute
	}
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	return errMethod
}

// healthz says whether changes can be stored.
func (s *server) healthz(w http.ResponseWriter, _ *http.Request) error {
	if err := s.store.check(); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}

// A response remembers what was answered, for the log line.
type response struct {
	http.ResponseWriter
	status int
	err    error
}

func (w *response) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// fail answers err: its status, its headers, and its words as the reason.
// The words of a failure of ours stay in the log.
func (w *response) fail(err error) {
	w.err = err
	if w.status != 0 {
		return // too late: half an answer is out
	}
	status, reason := statusOf(err), err.Error()
	switch status {
	case http.StatusUnauthorized:
		reason = "you can not pass!"                 // the words that clients compare
		w.Header().Set("WWW-Authenticate", "Bearer") // RFC 9110 §11.6.1
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	case http.StatusInternalServerError:
		reason = "something went wrong on our side"
	}
	if e, ok := errors.AsType[throttledError](err); ok {
		w.Header().Set("Retry-After", strconv.Itoa(int(e)))
	}
	fields, _ := errors.AsType[fieldErrors](err)
	writeJSON(w, status, struct {
		Reason string            `json:"reason"`
		Fields map[string]string `json:"fields,omitempty"`
	}{reason, fields})
}

// logLevel is above Info for what -quiet still logs.
func (w *response) logLevel() slog.Level {
	_, throttled := errors.AsType[throttledError](w.err)
	switch {
	case w.err != nil && statusOf(w.err) >= 500:
		return slog.LevelError
	case throttled, errors.Is(w.err, errWrongLogIn):
		return slog.LevelWarn
	}
	return slog.LevelInfo
}

// statusOf is the only place where an error becomes a status.
func statusOf(err error) int {
	is := func(target error) bool { return errors.Is(err, target) }
	switch {
	case is(errNotJSON), is(errNotForm), is(errTwice), is(errWrongLogIn), is(errRefreshToken):
		return http.StatusBadRequest
	case is(errToken):
		return http.StatusUnauthorized
	case is(errNoIdea), is(errNoRoute):
		return http.StatusNotFound
	case is(errMethod):
		return http.StatusMethodNotAllowed
	case is(errEmailTaken):
		return http.StatusConflict
	case is(errTooLarge):
		return http.StatusRequestEntityTooLarge
	case is(errMediaType):
		return http.StatusUnsupportedMediaType
	case is(errBusy), is(errNotStored):
		return http.StatusServiceUnavailable
	}
	if _, ok := errors.AsType[fieldErrors](err); ok {
		return http.StatusUnprocessableEntity
	}
	if _, ok := errors.AsType[throttledError](err); ok {
		return http.StatusTooManyRequests
	}
	return http.StatusInternalServerError
}

var (
	errNoRoute   = errors.New("there is nothing here")
	errMethod    = errors.New("this method is not for this path")
	errNotJSON   = errors.New("the body must be one JSON object, or a form")
	errNotForm   = errors.New("the form or query cannot be read")
	errTwice     = errors.New("something is given twice")
	errTooLarge  = errors.New("the body must be at most 64 KiB")
	errMediaType = errors.New("the Content-Type must be application/json or application/x-www-form-urlencoded")
)

// writeJSON answers v. It encodes before it writes, so that an error can
// still be answered.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err == nil {
		writeBody(w, status, body)
	}
	return err
}

// writeBody answers what is JSON already.
func writeBody(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	if len(body) > 2048 { // net/http adds that of a shorter one, and cheaper
		h.Set("Content-Length", strconv.Itoa(len(body)))
	}
	w.WriteHeader(status)
	w.Write(body)
}

// An input is what a client sent: the members of a JSON object, a form or a
// query. Each is read by the rule of its field. After that, err returns all that
// is wrong.
type input struct {
	members map[string]json.RawMessage // those of a form or a query are strings
	broken  error                      // why there are no members
	failed  fieldErrors
}

func readInput(r *http.Request) *input { return newInput(readBody(r)) }

func readQuery(r *http.Request) *input { return newInput(parseQuery(r.URL.RawQuery)) }

func newInput(members map[string]json.RawMessage, err error) *input {
	return &input{members: members, broken: err, failed: make(fieldErrors)}
}

// readBody reads a JSON object or a form. The body of a DELETE may be missing.
func readBody(r *http.Request) (map[string]json.RawMessage, error) {
	body, err := io.ReadAll(r.Body)
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, errTooLarge
	} else if err != nil {
		return nil, errNotJSON // it did not come whole
	}
	if len(body) == 0 && r.Method == http.MethodDelete {
		return nil, nil
	}
	mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	switch strings.ToLower(strings.TrimSpace(mediaType)) {
	case "application/x-www-form-urlencoded":
		if !bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{")) { // curl -d '{…}' says that it sends a form
			return parseQuery(string(body))
		}
	case "application/json", "":
	default:
		return nil, errMediaType
	}
	return parseObject(body)
}

// parseObject refuses what encoding/json would let pass: what is not UTF-8, and a
// name that comes twice. It does not decode into a struct, which would take
// names in any case.
func parseObject(body []byte) (members map[string]json.RawMessage, _ error) {
	err := json.Unmarshal(body, &members)
	switch {
	case err != nil, members == nil, !utf8.Valid(body):
		return nil, errNotJSON
	case len(members) < countMembers(body):
		return nil, errTwice
	}
	return members, nil
}

// countMembers counts the members of a valid object, by their colons.
func countMembers(object []byte) (count int) {
	depth, inText := 0, false
	for i := 0; i < len(object); i++ {
		switch c := object[i]; {
		case c == '\\':
			i++ // past what it escapes
		case c == '"':
			inText = !inText
		case inText:
		case c == '{', c == '[':
			depth++
		case c == '}', c == ']':
			depth--
		case c == ':' && depth == 1:
			count++
		}
	}
	return count
}

// parseQuery reads a query, or a form, which is written alike.
func parseQuery(query string) (map[string]json.RawMessage, error) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, errNotForm
	}
	members := make(map[string]json.RawMessage)
	for name, all := range values {
		if len(all) > 1 {
			return nil, errTwice
		}
		members[name], _ = json.Marshal(all[0]) // never fails: it is text
	}
	return members, nil
}

// text reads 1 to limit characters, after trimming.
func (in *input) text(name string, limit int) string {
	s := strings.TrimSpace(in.string(name))
	in.check(name, s, utf8.RuneCountInString(s), limit, "characters")
	return s
}

// secret reads 1 to limit bytes as they are, with no trimming.
func (in *input) secret(name string, limit int) string {
	s := in.string(name)
	in.check(name, s, len(s), limit, "bytes")
	return s
}

func (in *input) string(name string) (s string) {
	switch value := in.members[name]; {
	case value == nil:
		in.refuse(name, "must be given")
	case value[0] != '"':
		in.refuse(name, "must be text")
	default:
		json.Unmarshal(value, &s) // it is valid, see parseObject
	}
	return s
}

// check keeps to a length, and keeps out control characters other than tab and
// newline. U+FFFD is out, too: encoding/json puts it in place of what is not
// Unicode, and two passwords could become one.
func (in *input) check(name, s string, length, limit int, unit string) {
	if length < 1 || length > limit {
		in.refuse(name, fmt.Sprintf("must be 1 to %d %s long", limit, unit))
	}
	unwanted := func(r rune) bool {
		return r == utf8.RuneError || unicode.IsControl(r) && r != '\t' && r != '\n'
	}
	if strings.ContainsFunc(s, unwanted) {
		in.refuse(name, "must not hold control characters or U+FFFD")
	}
}

// integer reads an integer from 1 to limit, written in digits. Many clients
// send one as a string, which is as good.
func (in *input) integer(name string, limit int) int {
	digits := string(in.members[name])
	if strings.HasPrefix(digits, `"`) {
		digits = in.string(name)
	}
	n, err := strconv.ParseUint(digits, 10, 16)
	if in.members[name] == nil {
		in.refuse(name, "must be given")
	} else if err != nil || n < 1 || int(n) > limit {
		in.refuse(name, fmt.Sprintf("must be an integer from 1 to %d", limit))
	}
	return int(n)
}

// refuse notes what a field must be. The first rule that it breaks counts.
func (in *input) refuse(name, rule string) {
	if in.failed[name] == "" {
		in.failed[name] = rule
	}
}

func (in *input) err() error {
	if in.broken != nil || len(in.failed) == 0 {
		return in.broken
	}
	return in.failed
}

// fieldErrors tell of each field that breaks a rule what it must be.
type fieldErrors map[string]string

func (e fieldErrors) Error() string {
	var words []string
	for _, name := range slices.Sorted(maps.Keys(e)) {
		words = append(words, name+" "+e[name])
	}
	return strings.Join(words, "; ")
}
