// Command ideapool is the backend of "My Idea Pool": people sign up, log in
// and keep a pool of ideas, each scored for impact, ease and confidence and
// ranked by its average.
//
// A request goes from [http.Server] to [server.ServeHTTP] and, by the routes in
// [server.routes], to one handler. A handler reads its input, acts, and writes a
// response, or returns an error, which [writeError] turns into a response.
package main

import (
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
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	signal.Ignore(syscall.SIGPIPE) // keep running when nobody reads the log

	err := run(context.Background(), os.Args[1:], os.Stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return
	}
	status := 1
	if errors.Is(err, errUsage) {
		status = 2
	}
	time.AfterFunc(time.Second, func() { os.Exit(status) }) // even if nobody reads stderr
	fmt.Fprintln(os.Stderr, "ideapool:", err)
	os.Exit(status)
}

// run serves until ctx is done or a signal arrives. It checks everything before it
// changes any file other than the lock.
func run(ctx context.Context, args []string, stderr io.Writer) error {
	o, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", o.addr)
	if err != nil {
		return fmt.Errorf("-addr %s: %w; choose another address", o.addr, err)
	}
	defer listener.Close()
	logger := newLogger(stderr, o.quiet)
	key, store, err := open(o, logger)
	if err != nil {
		return err
	}
	defer store.release()

	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	go func() {                  // in the background, as writing may block
		printWarnings(logger, o, store)
		printWelcome(stderr, listener.Addr(), o)
	}()
	err = newServer(o, key, store, logger).serve(ctx, listener)
	if closeErr := store.close(); closeErr != nil {
		return fmt.Errorf("-data %s: %w; nothing is lost, the next start tries again", o.data, closeErr)
	}
	return err
}

// open reads the key and the data before it makes a key or changes the data.
func open(o options, logger *slog.Logger) (key *rsa.PrivateKey, s *store, err error) {
	key, err = readKey(o.key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("-key %s: %w", o.key, explain(err))
	}
	if s, err = openStore(o.data, realDisk, logger); err != nil {
		return nil, nil, fmt.Errorf("-data %s: %w", o.data, explain(err))
	}
	made := false
	if key == nil {
		if key, made, err = makeKey(o.key); err != nil {
			s.release()
			return nil, nil, fmt.Errorf("-key %s: %w", o.key, explain(err))
		}
	}
	if err := s.start(); err != nil {
		s.release()
		if made {
			os.Remove(o.key)
		}
		return nil, nil, fmt.Errorf("-data %s: %w", o.data, explain(err))
	}
	return key, s, nil
}

// explain adds advice to a file system error.
func explain(err error) error {
	_, isPath := errors.AsType[*fs.PathError](err)
	_, isLink := errors.AsType[*os.LinkError](err)
	if isPath || isLink {
		err = fmt.Errorf("%w; check that the directory exists, is writable and has free space, and that the file is not a mount point", err)
	}
	return err
}

// options are the command's flags.
type options struct {
	addr, data, key       string
	accessTTL, refreshTTL time.Duration
	corsOrigin            string
	quiet                 bool
}

var errUsage = errors.New("invalid usage")

// parseFlags reads the command line. It returns errUsage if the command line is
// invalid, and flag.ErrHelp after printing the help.
func parseFlags(args []string, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("ideapool", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // main prints errors
	flags.StringVar(&o.addr, "addr", "localhost:8080", "listen on `host:port`")
	flags.StringVar(&o.data, "data", "ideapool.json", "keep all data in `file`; '' keeps it in memory only")
	flags.StringVar(&o.key, "key", "ideapool.pem", "sign tokens with the RSA key in `file` (PEM), which is created if missing")
	flags.DurationVar(&o.accessTTL, "access-ttl", 10*time.Minute, "how long an access token is valid")
	flags.DurationVar(&o.refreshTTL, "refresh-ttl", 30*24*time.Hour, "how long a refresh token is valid")
	flags.StringVar(&o.corsOrigin, "cors-origin", "*", "allow web pages from this `origin`, such as https://example.org; '*' allows every origin, and none allows no origin")
	flags.BoolVar(&o.quiet, "quiet", false, "log failures only")

	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintln(stderr, "Usage: ideapool [flags]")
		flags.SetOutput(stderr)
		flags.PrintDefaults()
		return o, err
	case err == nil && flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case err == nil:
		err = o.check()
	}
	if err != nil {
		err = fmt.Errorf("%w: %w (run ideapool -h for help)", errUsage, err)
	}
	return o, err
}

func (o options) check() error {
	_, port, err := net.SplitHostPort(o.addr)
	key, keyErr := realPath(o.key)
	data, dataErr := realPath(o.data)
	shared := keyErr == nil && dataErr == nil && slices.Contains([]string{data, data + ".tmp", data + ".lock"}, key)
	switch {
	case err != nil, port == "":
		return fmt.Errorf("-addr %q must have a port, such as localhost:8080", o.addr)
	case o.key == "":
		return errors.New("-key is empty; give the name of a file")
	case shared:
		return errors.New("-key is one of the files that -data uses; choose another name")
	case min(o.accessTTL, o.refreshTTL) < time.Second:
		return errors.New("-access-ttl and -refresh-ttl must be 1s or more")
	case o.corsOrigin != "*" && o.corsOrigin != "none" && !isOrigin(o.corsOrigin):
		return fmt.Errorf("-cors-origin %q is not an origin as browsers send it; give '*', none, or one such as https://example.org", o.corsOrigin)
	}
	return nil
}

func isRegular(name string) error {
	info, err := os.Stat(name)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("not a regular file (its mode is %s); choose another one", info.Mode())
	}
	return err
}

var (
	originShape = regexp.MustCompile(`^([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:]+\])(?::([1-9][0-9]*))?$`)
	// Browsers read a host as an IPv4 address if its last label is a number
	// (https://url.spec.whatwg.org/#ends-in-a-number-checker).
	numericHost = regexp.MustCompile(`(^|\.)([0-9]+|0x[0-9a-f]*)\.?$`)
)

// isOrigin reports whether a browser sends s as Origin: a scheme, a host, and a
// port unless it is the default (RFC 6454 §6.2).
func isOrigin(s string) bool {
	parts := originShape.FindStringSubmatch(s)
	if parts == nil {
		return false
	}
	scheme, host, port := parts[1], strings.Trim(parts[2], "[]"), parts[3]
	if host != parts[2] || numericHost.MatchString(host) {
		addr, err := netip.ParseAddr(host)
		if err != nil {
			return false
		}
		canonical := addr.String()
		if addr.Is4In6() { // browsers write it in hexadecimal
			b := addr.As16()
			canonical = fmt.Sprintf("::ffff:%x:%x", int(b[12])<<8|int(b[13]), int(b[14])<<8|int(b[15]))
		}
		if canonical != host {
			return false
		}
	}
	_, err := strconv.ParseUint(port, 10, 16)
	defaults := map[string]string{"ftp": "21", "http": "80", "https": "443", "ws": "80", "wss": "443"}
	return scheme != "file" && (port == "" || err == nil && port != defaults[scheme])
}

func newLogger(w io.Writer, quiet bool) *slog.Logger {
	level := slog.LevelInfo
	if quiet {
		level = slog.LevelWarn
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

func printWarnings(logger *slog.Logger, o options, s *store) {
	if s.file != nil && s.file.torn > 0 {
		logger.Warn("dropped an incomplete last line (it was never acknowledged)", "file", o.data, "line", s.file.torn)
	}
	for _, name := range []string{o.key, o.data} {
		if name != "" && !isPrivate(name) {
			logger.Warn("other users have access to this file of secrets; run chmod 600 on it", "file", name)
		}
	}
}

func printWelcome(w io.Writer, addr net.Addr, o options) {
	fmt.Fprintf(w, `Idea Pool is at http://%s
  data: %s
  key:  %s
Try it:
  curl http://%[1]s/users -d email=me@example.org -d name=Me -d password=the-Secret-123
`, strings.Replace(addr.String(), "[::]", "localhost", 1), cmp.Or(o.data, "in memory, lost when this stops"), o.key)
}

// A server is the whole API as one [http.Handler].
type server struct {
	store      *store
	tokens     *tokens
	accessTTL  time.Duration
	refreshTTL time.Duration
	hashCost   argonCost
	hashing    semaphore
	throttle   loginThrottle
	logger     *slog.Logger

	mux      http.ServeMux
	patterns []string    // of all routes
	headers  http.Header // of every response
	cors     bool

	idPrefix string // a request id is the prefix and a count
	requests atomic.Uint64
}

func newServer(o options, key *rsa.PrivateKey, store *store, logger *slog.Logger) *server {
	s := &server{
		store:      store,
		tokens:     newTokens(key),
		accessTTL:  o.accessTTL,
		refreshTTL: o.refreshTTL,
		hashCost:   defaultCost(),
		hashing:    make(semaphore, max(1, runtime.GOMAXPROCS(0)-1)), // one core is for everything else
		throttle:   loginThrottle{failures: make(map[attempt]failures)},
		logger:     logger,
		headers: http.Header{
			"X-Content-Type-Options": {"nosniff"},
			"X-Frame-Options":        {"SAMEORIGIN"},
			"Cache-Control":          {"no-store"}, // nearly everything is private
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

// routes lists the API in the order of testdata/api/document.txt, followed by the
// routes that it lacks.
func (s *server) routes() {
	s.handle("POST /access-tokens/refresh", s.refresh)
	s.handle("POST /access-tokens", s.logIn)
	s.handle("DELETE /access-tokens", s.private(s.logOut))
	s.handle("GET /me", s.private(s.me))
	s.handle("POST /ideas", s.private(s.createIdea))
	s.handle("DELETE /ideas/{id}", s.private(s.deleteIdea))
	s.handle("GET /ideas", s.private(s.listIdeas))
	s.handle("PUT /ideas/{id}", s.private(s.updateIdea))
	s.handle("POST /users", s.signUp)

	s.handle("GET /.well-known/jwks.json", s.jwks)
	s.handle("GET /healthz", s.healthz)
}

// A handler writes a response, or returns an error.
type handler func(w http.ResponseWriter, r *http.Request) error

// handle registers the handler of a route.
func (s *server) handle(pattern string, h handler) {
	s.patterns = append(s.patterns, pattern)
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { s.respond(w, r, h) })
}

// serve responds to requests from listener until ctx is done, and then lets running
// requests finish.
func (s *server) serve(ctx context.Context, listener net.Listener) error {
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    12 << 10, // net/http adds 4 KiB of its own: 16 in all
		ErrorLog:          slog.NewLogLogger(s.logger.Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	deadline, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if srv.Shutdown(deadline) != nil {
		srv.Close()
	}
	return nil
}

const maxBody = 64 << 10 // bytes

// ServeHTTP finds the handler of a request.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	maps.Copy(w.Header(), s.headers)
	w.Header().Set("X-Request-Id", s.idPrefix+strconv.FormatUint(s.requests.Add(1), 10))
	r = cleanPath(r)
	_, pattern := s.mux.Handler(r)
	switch {
	case s.cors && r.Method == http.MethodOptions:
		s.respond(w, r, s.preflight)
	case r.ContentLength > maxBody:
		s.respond(w, r, func(http.ResponseWriter, *http.Request) error { return errTooLarge })
	case pattern == "":
		s.respond(w, r, s.noRoute)
	default:
		s.mux.ServeHTTP(w, r)
	}
}

// cleanPath makes //ideas and /ideas/ mean /ideas. The mux would redirect the
// first, which not all browsers follow after a preflight, and would not match the
// second. The path stays escaped: an escaped slash is data.
func cleanPath(r *http.Request) *http.Request {
	escaped := r.URL.EscapedPath()
	if strings.HasPrefix(escaped, "/") && path.Clean(escaped) == escaped {
		return r
	}
	clean := path.Clean("/" + escaped)
	u, copied := *r.URL, *r
	u.Path, _ = url.PathUnescape(clean) // EscapedPath is always valid
	u.RawPath = clean
	copied.URL = &u
	return &copied
}

// respond runs a handler and logs a line. If the handler fails before it writes
// anything, respond writes the error.
func (s *server) respond(w http.ResponseWriter, r *http.Request, h handler) {
	start := time.Now()
	rec := &recorder{ResponseWriter: w}
	err := recoverPanic(h, rec, r)
	if err != nil && rec.status == 0 {
		writeError(rec, err)
	}
	s.logRequest(r, rec, err, start)
}

// recoverPanic runs a handler and turns a panic into an error, except
// http.ErrAbortHandler, with which a handler aborts its response.
func recoverPanic(h handler, w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		switch p := recover(); p {
		case nil:
		case http.ErrAbortHandler:
			panic(p)
		default:
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return h(w, r)
}

// A recorder remembers the status of a response. It is 0 before there is one.
type recorder struct {
	http.ResponseWriter
	status int
}

func (w *recorder) WriteHeader(status int) {
	w.status = cmp.Or(w.status, status)
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(b []byte) (int, error) {
	w.status = cmp.Or(w.status, http.StatusOK)
	return w.ResponseWriter.Write(b)
}

// Unwrap is for [http.ResponseController].
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// logRequest logs a line without the query, which may hold a token.
func (s *server) logRequest(r *http.Request, w *recorder, err error, start time.Time) {
	level := logLevel(err)
	if !s.logger.Enabled(r.Context(), level) {
		return
	}
	target, _, _ := strings.Cut(r.RequestURI, "?")
	if r.URL.Host != "" { // as in http://user:password@host/path
		target = r.URL.EscapedPath()
	}
	attrs := []any{
		"method", r.Method, "path", target, "status", w.status,
		"duration", time.Since(start), "id", w.Header().Get("X-Request-Id"),
	}
	if level > slog.LevelInfo {
		attrs = append(attrs, "error", err)
	}
	s.logger.Log(r.Context(), level, "request", attrs...)
}

// logLevel returns a level above Info for failures, which -quiet still logs.
func logLevel(err error) slog.Level {
	switch {
	case err != nil && statusOf(err) >= 500:
		return slog.LevelError
	case errors.Is(err, errThrottled), errors.Is(err, errWrongLogin):
		return slog.LevelWarn
	}
	return slog.LevelInfo
}

// preflight responds to the OPTIONS request that a browser sends before some
// requests to another origin (https://fetch.spec.whatwg.org/#cors-preflight-fetch).
func (s *server) preflight(w http.ResponseWriter, r *http.Request) error {
	var methods []string
	for _, pattern := range s.patterns {
		method, _, _ := strings.Cut(pattern, " ")
		methods = append(methods, method)
	}
	slices.Sort(methods)
	h := w.Header()
	h.Set("Access-Control-Allow-Methods", strings.Join(slices.Compact(methods), ", "))
	h.Set("Access-Control-Max-Age", "86400") // a day, in seconds
	if asked := r.Header.Values("Access-Control-Request-Headers"); len(asked) > 0 {
		h["Access-Control-Allow-Headers"] = asked
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// noRoute asks the mux whether the path or the method is wrong. The mux itself
// would respond in plain text.
func (s *server) noRoute(w http.ResponseWriter, r *http.Request) error {
	h, _ := s.mux.Handler(r)
	response := make(headersOnly)
	h.ServeHTTP(response, r)
	allow := response.Header().Get("Allow") // RFC 9110 §15.5.6
	if allow == "" {
		return errNoRoute
	}
	w.Header().Set("Allow", allow)
	return errMethod
}

// headersOnly is a ResponseWriter that keeps nothing but the headers.
type headersOnly http.Header

func (h headersOnly) Header() http.Header         { return http.Header(h) }
func (h headersOnly) WriteHeader(int)             {}
func (h headersOnly) Write(b []byte) (int, error) { return len(b), nil }

// healthz responds to GET /healthz.
func (s *server) healthz(w http.ResponseWriter, _ *http.Request) error {
	if err := s.store.checkHealth(); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}

// writeError responds with the status of an error and its text as the reason. The
// text of an internal error is only logged.
func writeError(w http.ResponseWriter, err error) {
	status, reason := statusOf(err), err.Error()
	switch status {
	case http.StatusUnauthorized:
		reason = "you can not pass!"                 // the original API's words, which clients compare
		w.Header().Set("WWW-Authenticate", "Bearer") // RFC 9110 §11.6.1
	case http.StatusRequestEntityTooLarge:
		w.Header().Set("Connection", "close") // or net/http waits for the rest of the body
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	case http.StatusInternalServerError:
		reason = "something went wrong on the server"
	}
	fields, _ := errors.AsType[fieldErrors](err)
	writeJSON(w, status, struct {
		Reason string      `json:"reason"`
		Fields fieldErrors `json:"fields,omitempty"`
	}{reason, fields})
}

// statusOf is the only place where an error becomes a status.
func statusOf(err error) int {
	is := func(target error) bool { return errors.Is(err, target) }
	switch {
	case is(errBody), is(errForm), is(errDuplicate), is(errWrongLogin), is(errRefreshToken):
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
	case is(errThrottled):
		return http.StatusTooManyRequests
	case is(errBusy), is(errNoExpiry), is(errNotSaved):
		return http.StatusServiceUnavailable
	}
	if _, ok := errors.AsType[fieldErrors](err); ok {
		return http.StatusUnprocessableEntity
	}
	return http.StatusInternalServerError
}

var (
	errNoRoute   = errors.New("there is nothing at this path")
	errMethod    = errors.New("method not allowed")
	errBody      = errors.New("the body must be one JSON object, or a form")
	errForm      = errors.New("the form is malformed")
	errDuplicate = errors.New("is given twice")
	errTooLarge  = errors.New("the body must be at most 64 KiB")
	errMediaType = errors.New("the Content-Type must be application/json or application/x-www-form-urlencoded")
)

// writeJSON responds with v. It encodes before it writes, so that an error can
// still become a response.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err == nil {
		writeBody(w, status, body)
	}
	return err
}

// writeBody responds with body, which is JSON already.
func writeBody(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}
