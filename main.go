// Command ideapool is the backend of "My Idea Pool": people sign up, log in
// and keep a pool of ideas, each scored for impact, ease and confidence and
// ranked by its average.
//
// A request goes from [http.Server] to [server.ServeHTTP] and, by the routes in
// [server.routes], to one handler. A handler reads its input, acts, and writes a
// response, or returns an error, which [writeError] turns into a response.
package main

import (
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
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
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
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
)

func main() {
	signal.Ignore(syscall.SIGPIPE) // keep running when nobody reads the log

	err := run(context.Background(), os.Args[1:], os.Stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return
	}
	fmt.Fprintln(os.Stderr, "ideapool:", err)
	if errors.Is(err, errUsage) {
		os.Exit(2)
	}
	os.Exit(1)
}

// run serves until ctx is done or a signal arrives.
func run(ctx context.Context, args []string, stderr io.Writer) error {
	o, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", o.addr)
	if err != nil {
		return fmt.Errorf("-addr %s: %w", o.addr, err)
	}
	defer listener.Close()
	logger := newLogger(stderr, o.quiet)
	key, s, err := open(o, logger)
	if err != nil {
		return err
	}
	defer s.release()

	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	printWelcome(stderr, listener.Addr(), o)
	err = newServer(o, key, s, logger).serve(ctx, listener)
	if closeErr := s.close(); closeErr != nil {
		return fmt.Errorf("-data %s: cannot compact it for the stop: %w", o.data, closeErr)
	}
	return err
}

// A server is the whole API as one [http.Handler].
type server struct {
	options  options
	store    *store
	tokens   *tokens
	hashCost argonCost
	hashing  semaphore
	throttle loginThrottle
	logger   *slog.Logger

	mux      http.ServeMux
	patterns []string    // of the API's routes
	headers  http.Header // of every response
}

func newServer(o options, key *rsa.PrivateKey, st *store, logger *slog.Logger) *server {
	s := &server{
		options:  o,
		store:    st,
		tokens:   newTokens(key),
		hashCost: defaultCost(),
		hashing:  make(semaphore, max(1, min(3, runtime.GOMAXPROCS(0)-1))), // each takes 19 MiB and a core
		throttle: loginThrottle{failures: make(map[attempt]failures)},
		logger:   logger,
		headers: http.Header{
			"X-Content-Type-Options": {"nosniff"},
			"X-Frame-Options":        {"SAMEORIGIN"},
			"Cache-Control":          {"no-store"}, // nearly everything is private
		},
	}
	if o.corsOrigin != "none" {
		s.headers.Set("Access-Control-Allow-Origin", o.corsOrigin)
		s.headers.Set("Access-Control-Expose-Headers", "Link, Retry-After, X-Request-Id")
	}
	if o.corsOrigin != "none" && o.corsOrigin != "*" {
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

	s.mux.Handle("GET /{$}", s.wrap(s.index))
	s.mux.Handle("/", s.wrap(s.noRoute)) // whatever matches no other route
	if s.options.corsOrigin != "none" {
		s.mux.Handle("OPTIONS /", s.wrap(s.preflight))
	}
}

// A handler writes a response, or returns an error.
type handler func(w http.ResponseWriter, r *http.Request) error

// handle registers a route of the API.
func (s *server) handle(pattern string, h handler) {
	s.patterns = append(s.patterns, pattern)
	s.mux.Handle(pattern, s.wrap(h))
}

// serve responds to requests from listener until ctx is done, and then lets running
// requests finish.
func (s *server) serve(ctx context.Context, listener net.Listener) error {
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       3 * time.Minute, // Caddy reuses a connection for up to two
		MaxHeaderBytes:    12 << 10,        // net/http adds 4 KiB of its own: 16 in all
		ErrorLog:          slog.NewLogLogger(s.logger.Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	// Docker kills a container ten seconds after SIGTERM.
	deadline, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	if srv.Shutdown(deadline) != nil {
		srv.Close()
	}
	return nil
}

const maxBody = 64 << 10 // bytes

// ServeHTTP sets the common headers, cleans the path, lets the mux find the handler,
// and reads what is left of the body.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	maps.Copy(w.Header(), s.headers)
	w.Header().Set("X-Request-Id", strconv.FormatUint(rand.Uint64(), 36))
	if path.Clean(r.URL.Path) != r.URL.Path {
		r = cleanPath(r)
	}
	if r.ContentLength == 0 {
		s.mux.ServeHTTP(w, r)
		return
	}
	response := http.NewResponseController(w)
	response.EnableFullDuplex() // or net/http would read the body before it sends the response
	s.mux.ServeHTTP(w, r)
	if r.Header.Get("Expect") == "" { // or the client may never send the body
		drain(response, r.Body)
	}
}

// cleanPath makes //ideas and /ideas/ mean /ideas. The mux would redirect the first,
// which browsers do not follow after a preflight, and would not match the second. The
// path stays escaped: an escaped slash is data. (The root is there for requests without
// a path, and the empty element removes a slash at the end.)
func cleanPath(r *http.Request) *http.Request {
	root := url.URL{Path: "/", RawQuery: r.URL.RawQuery}
	clean := *r
	clean.URL = root.JoinPath(r.URL.EscapedPath(), "")
	return &clean
}

// drain sends the response and then reads what is left of the body, up to 1 MiB and
// for at most a second. If a connection is closed before that, the kernel resets it,
// and the client may never see the response (https://go.dev/issue/22209).
func drain(response *http.ResponseController, body io.Reader) {
	response.Flush()
	response.SetReadDeadline(time.Now().Add(time.Second))
	if _, err := io.CopyN(io.Discard, body, 1<<20); err != io.EOF {
		panic(http.ErrAbortHandler) // or the rest would count as the next request
	}
}

// wrap returns a handler for the mux. It runs h and logs a line. If h fails before it
// writes anything, it writes the error. If h fails later, it aborts the connection: the
// client must not take a part of a response for the whole.
func (s *server) wrap(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		rec := &recorder{ResponseWriter: w}
		err := recoverPanic(h, rec, r)
		abort := false
		switch {
		case err == nil:
		case errors.Is(err, errClientGone):
			rec.status, abort = errClientGone.status, true
		case err == http.ErrAbortHandler, rec.status != 0:
			abort = true
		default:
			writeError(rec, err)
		}
		s.logRequest(r, rec, err, time.Since(start))
		if abort {
			panic(http.ErrAbortHandler)
		}
	}
}

// recoverPanic runs a handler and turns a panic into an error.
func recoverPanic(h handler, w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		switch p := recover(); p {
		case nil:
		case http.ErrAbortHandler:
			err = http.ErrAbortHandler
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
	if status >= 200 { // 1xx is not the response
		w.status = cmp.Or(w.status, status)
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(b []byte) (int, error) {
	w.status = cmp.Or(w.status, http.StatusOK)
	return w.ResponseWriter.Write(b)
}

// Unwrap is for [http.ResponseController].
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// logRequest logs a line without the query, which may hold a token. Failures have a
// level above Info, so that -quiet still logs them.
func (s *server) logRequest(r *http.Request, w *recorder, err error, duration time.Duration) {
	level := slog.LevelInfo
	known, isKnown := errors.AsType[*apiError](err)
	switch {
	case err == nil:
	case !isKnown, known.status >= 500:
		level = slog.LevelError
	case known == errWrongLogin, known.status == http.StatusTooManyRequests:
		level = slog.LevelWarn
	}
	if !s.logger.Enabled(r.Context(), level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("method", r.Method),
		slog.String("path", r.URL.EscapedPath()),
		slog.Int("status", w.status),
		slog.Duration("duration", duration),
		slog.String("client", s.clientAddr(r).String()),
		slog.String("id", w.Header().Get("X-Request-Id")),
	}
	if level > slog.LevelInfo {
		attrs = append(attrs, slog.Any("error", err))
	}
	s.logger.LogAttrs(r.Context(), level, "request", attrs...)
}

// preflight responds to the OPTIONS request that a browser sends before some
// requests to another origin (https://fetch.spec.whatwg.org/#cors-preflight-fetch).
func (s *server) preflight(w http.ResponseWriter, r *http.Request) error {
	h := w.Header()
	h.Set("Access-Control-Allow-Methods", strings.Join(s.methods(), ", "))
	h.Set("Access-Control-Max-Age", "86400") // a day, in seconds
	if asked := r.Header.Values("Access-Control-Request-Headers"); len(asked) > 0 {
		h["Access-Control-Allow-Headers"] = asked
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// methods returns the methods of all routes.
func (s *server) methods() []string {
	var methods []string
	for _, pattern := range s.patterns {
		method, _, _ := strings.Cut(pattern, " ")
		methods = append(methods, method)
	}
	slices.Sort(methods)
	return slices.Compact(methods)
}

// noRoute asks the mux whether the path or the method is wrong.
func (s *server) noRoute(w http.ResponseWriter, r *http.Request) error {
	var allowed []string
	for _, method := range append(s.methods(), http.MethodHead) {
		_, pattern := s.mux.Handler(&http.Request{Method: method, URL: r.URL})
		if pattern != "/" {
			allowed = append(allowed, method)
		}
	}
	if allowed == nil {
		return errNoRoute
	}
	slices.Sort(allowed)
	w.Header().Set("Allow", strings.Join(allowed, ", ")) // RFC 9110 §15.5.6
	return errMethod
}

// index responds to GET / for people who open the printed address in a browser.
func (s *server) index(w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]any{"name": "Idea Pool", "routes": s.patterns})
}

// healthz responds to GET /healthz.
func (s *server) healthz(w http.ResponseWriter, _ *http.Request) error {
	if err := s.store.checkHealth(); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}

// An apiError is an error that a client may see: a status, and the body of the
// response. The text of any other error is only logged.
type apiError struct {
	status     int
	retryAfter int               // seconds, of a 429 or 503
	Reason     string            `json:"reason"` // words for people
	Fields     map[string]string `json:"fields,omitempty"`
}

func (e *apiError) Error() string { return e.Reason }

var (
	errNoRoute   = &apiError{status: http.StatusNotFound, Reason: "there is nothing at this path"}
	errMethod    = &apiError{status: http.StatusMethodNotAllowed, Reason: "method not allowed"}
	errTooLarge  = &apiError{status: http.StatusRequestEntityTooLarge, Reason: "the body must be at most 64 KiB"}
	errMediaType = &apiError{status: http.StatusUnsupportedMediaType, Reason: "the Content-Type must be application/json or application/x-www-form-urlencoded"}
	errBody      = &apiError{status: http.StatusBadRequest, Reason: "the body must be one JSON object, or a form"}
	errForm      = &apiError{status: http.StatusBadRequest, Reason: "the form is malformed; escape ; as %3B and % as %25 (curl: --data-urlencode)"}
	errLateBody  = &apiError{status: http.StatusRequestTimeout, Reason: "the body did not arrive in time"}
	errInternal  = &apiError{status: http.StatusInternalServerError, Reason: "something went wrong on the server"}

	// errClientGone is never sent. 499 is what nginx logs then.
	errClientGone = &apiError{status: 499, Reason: "the client has gone"}
)

// invalidFields returns an error that names each field and the rule that it breaks.
func invalidFields(fields map[string]string) *apiError {
	var words []string
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		words = append(words, name+" "+fields[name])
	}
	return &apiError{status: http.StatusUnprocessableEntity, Reason: strings.Join(words, "; "), Fields: fields}
}

// writeError responds with an error.
func writeError(w http.ResponseWriter, err error) {
	e, known := errors.AsType[*apiError](err)
	if !known {
		e = errInternal
	}
	if e.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer") // RFC 9110 §11.6.1
	}
	if e.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(e.retryAfter))
	}
	writeJSON(w, e.status, e)
}

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

// An input is what a client sent: the members of a JSON object, a form or a query.
// Each is read by the rule of its field. After that, err returns everything that
// is wrong.
type input struct {
	members map[string]json.RawMessage
	bodyErr error // why there are no members
	invalid map[string]string
}

func newInput(members map[string]json.RawMessage, err error) *input {
	return &input{members: members, bodyErr: err, invalid: make(map[string]string)}
}

func readBody(r *http.Request) *input { return newInput(parseBody(r)) }

// parseBody reads a JSON object or a form. A DELETE may have no body.
func parseBody(r *http.Request) (map[string]json.RawMessage, error) {
	if r.ContentLength > maxBody {
		return nil, errTooLarge // before the client sends it
	}
	body, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, maxBody))
	if err != nil {
		return nil, bodyError(err)
	}
	if len(body) == 0 && r.Method == http.MethodDelete {
		return nil, nil
	}
	mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	switch strings.ToLower(strings.TrimSpace(mediaType)) {
	case "", "application/json":
		return parseObject(body)
	case "application/x-www-form-urlencoded":
		if bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{")) { // as curl -d '{…}' sends it
			return parseObject(body)
		}
		return parseForm(string(body))
	}
	return nil, errMediaType
}

func bodyError(err error) error {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return errTooLarge
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errLateBody
	}
	return errBody // it did not arrive as a whole
}

// parseObject reads one JSON object. (json.Unmarshal alone would accept null, and
// replace invalid UTF-8.)
func parseObject(body []byte) (members map[string]json.RawMessage, err error) {
	if !utf8.Valid(body) || json.Unmarshal(body, &members) != nil || members == nil {
		return nil, errBody
	}
	return members, nil
}

func parseForm(form string) (map[string]json.RawMessage, error) {
	values, err := url.ParseQuery(form)
	if err != nil {
		return nil, errForm
	}
	return toJSON(values), nil
}

// toJSON returns the first value of each name.
func toJSON(values url.Values) map[string]json.RawMessage {
	members := make(map[string]json.RawMessage)
	for name := range values {
		members[name], _ = json.Marshal(values.Get(name)) // text is always valid
	}
	return members
}

// text reads 1 to limit characters, after trimming.
func (in *input) text(name string, limit int) string {
	s := strings.TrimSpace(in.string(name))
	in.checkText(name, s, utf8.RuneCountInString(s), limit, "characters")
	return s
}

// secret reads 1 to limit bytes as they are, without trimming.
func (in *input) secret(name string, limit int) string {
	s := in.string(name)
	in.checkText(name, s, len(s), limit, "bytes")
	return s
}

func (in *input) string(name string) string {
	value, given := in.members[name]
	if !given {
		in.reject(name, "must be given")
		return ""
	}
	var s *string // nil for null
	if json.Unmarshal(value, &s) != nil || s == nil {
		in.reject(name, "must be text")
		return ""
	}
	return *s
}

// checkText rejects text of the wrong length, control characters that a text area
// does not send, and U+FFFD: encoding/json puts it in place of what is not
// Unicode, so that two passwords could become one.
func (in *input) checkText(name, s string, length, limit int, unit string) {
	switch {
	case length == 0:
		in.reject(name, "must not be empty")
	case length > limit:
		in.reject(name, fmt.Sprintf("must be at most %d %s long", limit, unit))
	}
	unwanted := func(r rune) bool {
		return r == utf8.RuneError || unicode.IsControl(r) && !strings.ContainsRune("\t\n\r", r)
	}
	if strings.ContainsFunc(s, unwanted) {
		in.reject(name, "must not contain control characters or U+FFFD")
	}
}

// integer reads an integer from 1 to limit. Many clients send it as a string of
// digits, which is accepted, too.
func (in *input) integer(name string, limit int) int {
	value, given := in.members[name]
	if !given {
		in.reject(name, "must be given")
		return 0
	}
	digits := string(value)
	if digits[0] == '"' {
		json.Unmarshal(value, &digits)
	}
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || n < 1 || int(n) > limit {
		in.reject(name, fmt.Sprintf("must be an integer from 1 to %d", limit))
	}
	return int(n)
}

// reject records a rule that a field breaks. Only the first is kept.
func (in *input) reject(name, rule string) {
	if in.invalid[name] == "" {
		in.invalid[name] = rule
	}
}

func (in *input) err() error {
	if in.bodyErr == nil && len(in.invalid) > 0 {
		return invalidFields(in.invalid)
	}
	return in.bodyErr
}

// open reads the key and the data before it makes a key or changes the data.
func open(o options, logger *slog.Logger) (*rsa.PrivateKey, *store, error) {
	key, err := readKey(o.key)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("-key %s: %w", o.key, err)
	}
	s, err := openStore(o.data, realDisk, logger)
	if err != nil {
		return nil, nil, fmt.Errorf("-data %s: %w", o.data, err)
	}
	if key == nil {
		if key, err = makeKey(o.key); err != nil {
			s.release()
			return nil, nil, fmt.Errorf("-key %s: %w", o.key, err)
		}
	}
	if err := s.start(); err != nil {
		s.release()
		return nil, nil, fmt.Errorf("-data %s: %w", o.data, err)
	}
	if s.file != nil && s.file.torn > 0 {
		logger.Warn("dropped an incomplete last line (it was never acknowledged)", "file", o.data, "line", s.file.torn)
	}
	return key, s, nil
}

// options are the command's flags.
type options struct {
	addr, data, key       string
	accessTTL, refreshTTL time.Duration
	corsOrigin            string
	trustProxy, quiet     bool
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
	flags.BoolVar(&o.trustProxy, "trust-proxy", false, "take the client's address from X-Forwarded-For; for a server behind one proxy")
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
		err = o.validate()
	}
	if err != nil {
		err = fmt.Errorf("%w: %w (run ideapool -h for help)", errUsage, err)
	}
	return o, err
}

func (o options) validate() error {
	_, port, err := net.SplitHostPort(o.addr)
	key, keyErr := realPath(o.key)
	data, dataErr := realPath(o.data)
	shared := keyErr == nil && dataErr == nil && slices.Contains([]string{data, data + ".tmp", data + ".lock"}, key)
	switch {
	case err != nil, port == "":
		return fmt.Errorf("-addr %q must have a port, such as localhost:8080", o.addr)
	case o.key == "":
		return errors.New("-key is empty; give the name of a file")
	case strings.HasSuffix(o.key, "/"), strings.HasSuffix(o.data, "/"):
		return errors.New("-data and -key must name files, not directories")
	case shared:
		return errors.New("-key is one of the files that -data uses; choose another name")
	case min(o.accessTTL, o.refreshTTL) < time.Second:
		return errors.New("-access-ttl and -refresh-ttl must be 1s or more")
	case o.corsOrigin != "*" && o.corsOrigin != "none" && !isOrigin(o.corsOrigin):
		return fmt.Errorf("-cors-origin %q is not an origin as browsers send it; give '*', none, or one such as https://example.org", o.corsOrigin)
	}
	return nil
}

var originShape = regexp.MustCompile(`^[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[1-9][0-9]*)?$`)

// isOrigin reports whether s looks like what a browser sends as Origin: a scheme, a
// host, and a port unless it is the default (RFC 6454 §6.2).
func isOrigin(s string) bool {
	u, err := url.Parse(s)
	if err != nil || u.Scheme == "file" || !originShape.MatchString(s) {
		return false
	}
	port, err := strconv.ParseUint(cmp.Or(u.Port(), "1"), 10, 16)
	isDefault := u.Scheme == "http" && port == 80 || u.Scheme == "https" && port == 443
	return err == nil && !isDefault
}

func newLogger(w io.Writer, quiet bool) *slog.Logger {
	level := slog.LevelInfo
	if quiet {
		level = slog.LevelWarn
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

func printWelcome(w io.Writer, addr net.Addr, o options) {
	fmt.Fprintf(w, `Idea Pool is at http://%s
  data: %s
  key:  %s
Try it:
  curl http://%[1]s/users -d email=me@example.org -d name=Me -d password=the-Secret-123
`, strings.Replace(addr.String(), "[::]", "localhost", 1), cmp.Or(o.data, "in memory, lost when this stops"), o.key)
}
