package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/argon2"
)

// maxSessions is how many sessions a user can have; one more ends the oldest.
const maxSessions = 100

// A session lasts from a sign-up or login until it is logged out or expires. Its
// refresh token is known to the client alone.
type session struct {
	Key     string `json:"key"` // SHA-256 of the refresh token, in hex
	UserID  string `json:"user"`
	Start   int64  `json:"start"`   // seconds since 1970
	Expires int64  `json:"expires"` // seconds since 1970
}

// A tokenID identifies an access token. Tokens of a user that expire in the same
// second count as one.
type tokenID struct {
	UserID  string `json:"user"`
	Expires int64  `json:"exp"` // seconds since 1970
}

func compareTokens(a, b tokenID) int {
	return cmp.Or(cmp.Compare(a.UserID, b.UserID), cmp.Compare(a.Expires, b.Expires))
}

// A logout ends an access token, and the session with this key if it belongs to
// the same user.
type logout struct {
	tokenID
	Key string `json:"key,omitempty"`
}

var (
	errWrongLogin   = errors.New("wrong e-mail or password")
	errRefreshToken = errors.New("the refresh token is unknown, expired or logged out")
	errThrottled    = errors.New("too many failed logins")
	errBusy         = errors.New("too many people are logging in or signing up right now; please try again")
	errNoExpiry     = errors.New("too many logouts in a short time; please try again")
)

// refresh responds to POST /access-tokens/refresh. A bad refresh token is a 400,
// as for any token endpoint (RFC 6749 §5.2): clients respond to a 401 with a
// refresh, and would do so forever.
func (s *server) refresh(w http.ResponseWriter, r *http.Request) error {
	in := readBody(w, r)
	token := in.secret("refresh_token", maxBody)
	if err := in.err(); err != nil {
		return err
	}
	session, u, ok := s.store.session(hashToken(token))
	if !ok || time.Now().Unix() >= session.Expires {
		return errRefreshToken
	}
	jwt, err := s.newAccessToken(u)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, tokenResponse{JWT: jwt})
}

// logIn responds to POST /access-tokens.
func (s *server) logIn(w http.ResponseWriter, r *http.Request) error {
	in := readBody(w, r)
	email := in.text("email", maxBody) // not validated: an invalid one is unknown
	password := in.secret("password", maxPassword)
	if err := in.err(); err != nil {
		return err
	}
	u, err := s.checkPassword(w, r, email, password)
	if err != nil {
		return err
	}
	return s.startSession(w, u, change{})
}

// logOut responds to DELETE /access-tokens. The refresh token comes in the query
// or in the body.
func (s *server) logOut(w http.ResponseWriter, r *http.Request, u user) error {
	in := readQuery(r, "refresh_token")
	if in.members["refresh_token"] == "" {
		in = readBody(w, r)
	}
	token := in.secret("refresh_token", maxBody)
	if err := in.err(); err != nil {
		return err
	}
	c, err := s.tokens.verify(accessToken(r.Header))
	if err != nil {
		return err
	}
	if err := s.store.commit(change{Logout: &logout{c.id(), hashToken(token)}}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// startSession adds a session of u to c, which may be a sign-up, commits c, and
// responds with the tokens.
func (s *server) startSession(w http.ResponseWriter, u user, c change) error {
	token, err := s.newAccessToken(u) // first: after a failure there is no session
	if err != nil {
		return err
	}
	random := make([]byte, 50)
	rand.Read(random) // never fails
	refreshToken, now := hex.EncodeToString(random), time.Now()
	c.Session = &session{
		Key: hashToken(refreshToken), UserID: u.ID, Start: now.Unix(), Expires: now.Add(s.refreshTTL).Unix(),
	}
	if err := s.store.commit(c); err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, tokenResponse{token, refreshToken})
}

// A tokenResponse has a client's tokens.
type tokenResponse struct {
	JWT          string `json:"jwt"`
	RefreshToken string `json:"refresh_token,omitempty"`
}

// newAccessToken makes a token. Its expiry differs from that of every logged-out
// token of the user, which it would otherwise equal.
func (s *server) newAccessToken(u user) (string, error) {
	now := time.Now()
	expires, ok := s.store.freeExpiry(u.ID, now.Unix(), now.Add(s.accessTTL).Unix())
	if !ok {
		return "", errNoExpiry
	}
	return s.tokens.sign(claims{Expires: expires, UserID: u.ID, Email: u.Email, Name: u.Name})
}

// hashToken returns the hash of a refresh token. It needs no salt: nobody can try
// all values of 50 random bytes.
func hashToken(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// private wraps a handler that needs a logged-in user.
func (s *server) private(h func(http.ResponseWriter, *http.Request, user) error) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		u, err := s.authenticate(r)
		if err != nil {
			return err
		}
		return h(w, r, u)
	}
}

// authenticate returns the user whose access token came with the request.
func (s *server) authenticate(r *http.Request) (user, error) {
	c, err := s.tokens.verify(accessToken(r.Header))
	if err != nil {
		return user{}, err
	}
	u, ok := s.store.activeUser(c.id())
	if !ok {
		return user{}, errToken
	}
	return u, nil
}

// accessToken returns the token in X-Access-Token, or else in Authorization
// (RFC 6750 §2.1), there after Bearer, in upper or lower case (RFC 9110 §11.1). A
// repeated header counts as no token. X-Access-Token may have the word, too.
func accessToken(h http.Header) string {
	values, needsScheme := h["X-Access-Token"], false
	if values == nil {
		values, needsScheme = h["Authorization"], true
	}
	if len(values) != 1 {
		return ""
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	switch {
	case strings.EqualFold(scheme, "Bearer"):
		return strings.TrimLeft(token, " ")
	case !needsScheme:
		return values[0]
	}
	return ""
}

// jwks responds to GET /.well-known/jwks.json (RFC 7517 §5). With it other
// services can verify tokens but not make them, which is what RS256 is for.
func (s *server) jwks(w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]any{"keys": []any{s.tokens.jwk()}})
}

// An argonCost is how hard it is to compute a hash. It is part of each hash, so new
// hashes can have a higher one.
type argonCost struct {
	memory  uint32 // KiB
	passes  uint32
	threads uint8
}

// defaultCost is what OWASP's Password Storage Cheat Sheet asks for. It takes some
// 20 ms.
func defaultCost() argonCost { return argonCost{memory: 19_456, passes: 2, threads: 1} }

// checkPassword returns the user who has this e-mail and password. An unknown
// e-mail costs one hash, as a wrong password does, so that the time does not tell
// them apart.
func (s *server) checkPassword(w http.ResponseWriter, r *http.Request, email, password string) (user, error) {
	a := newAttempt(r, email)
	if wait := s.throttle.wait(a); wait > 0 {
		return user{}, throttled(w, wait)
	}
	u, known := s.store.userByEmail(email)
	if !known {
		u.Password = dummyHash(s.hashCost)
	}
	err := s.hashing.do(r.Context(), func() error {
		if wait := s.throttle.begin(a); wait > 0 {
			return throttled(w, wait) // others failed while this one waited
		}
		right := matches(password, u.Password)
		if s.throttle.end(a, right); !right {
			return errWrongLogin
		}
		return nil
	})
	return u, err
}

func throttled(w http.ResponseWriter, wait time.Duration) error {
	seconds := int(math.Ceil(wait.Seconds()))
	w.Header().Set("Retry-After", strconv.Itoa(seconds))
	return fmt.Errorf("%w; please try again in %d seconds", errThrottled, seconds)
}

// hashPassword returns the hash to be stored.
func (s *server) hashPassword(ctx context.Context, password string) (hash string, err error) {
	err = s.hashing.do(ctx, func() error {
		salt := make([]byte, 16)
		rand.Read(salt) // never fails
		hash = argonHash(password, salt, s.hashCost)
		return nil
	})
	return hash, err
}

func argonHash(password string, salt []byte, cost argonCost) string {
	sum := argon2.IDKey([]byte(password), salt, cost.passes, cost.memory, cost.threads, 32)
	return formatHash(cost, salt, sum)
}

// formatHash uses the PHC string format
// (https://github.com/P-H-C/phc-string-format).
func formatHash(cost argonCost, salt, sum []byte) string {
	encode := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s",
		argon2.Version, cost.memory, cost.passes, cost.threads, encode(salt), encode(sum))
}

// dummyHash costs as much to check as a real hash, but no password matches it.
func dummyHash(cost argonCost) string { return formatHash(cost, make([]byte, 16), make([]byte, 32)) }

// matches computes the hash again, with the salt and the cost of the old one.
func matches(password, hash string) bool {
	var cost argonCost
	var saltAndSum string
	fmt.Sscanf(hash, "$argon2id$v=19$m=%d,t=%d,p=%d$%s", &cost.memory, &cost.passes, &cost.threads, &saltAndSum)
	encodedSalt, _, _ := strings.Cut(saltAndSum, "$")
	salt, err := base64.RawStdEncoding.DecodeString(encodedSalt)
	if err != nil || cost.passes < 1 || cost.threads < 1 { // argon2.IDKey would panic
		return false
	}
	again := argonHash(password, salt, cost)
	return subtle.ConstantTimeCompare([]byte(again), []byte(hash)) == 1
}

// A semaphore limits how many hashes are computed at a time. Without it, 48
// logins at once would slow down everybody else and take 1 GB of memory.
type semaphore chan struct{}

// do runs work as soon as a slot is free. It returns errBusy if none is free for
// 5 seconds, or the client is gone.
func (s semaphore) do(ctx context.Context, work func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	select {
	case s <- struct{}{}:
		defer func() { <-s }()
		return work()
	case <-ctx.Done():
		return errBusy
	}
}

// freeFailures is how many logins may fail before there is a wait.
const freeFailures = 10

// A loginThrottle slows down attacks on passwords: after ten failures an attempt
// must wait, and only one can be made at a time; each further failure doubles the
// wait. Other people log in as usual.
type loginThrottle struct {
	mu       sync.Mutex
	failures map[attempt]failures
}

// An attempt identifies login attempts by e-mail, known or not, and client
// address.
type attempt struct {
	email  [sha256.Size]byte // its hash, as an e-mail may be long
	client netip.Prefix
}

type failures struct {
	count int
	until time.Time // no attempt before
}

// newAttempt uses the address of the connection. A client could write anything
// into a header such as X-Forwarded-For.
func newAttempt(r *http.Request, email string) attempt {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	addr, bits := from.Addr(), 32
	if addr.Is6() {
		bits = 64 // one subnet (RFC 4291 §2.5.1)
	}
	client, _ := addr.Prefix(bits)
	return attempt{sha256.Sum256([]byte(normalizeEmail(email))), client}
}

// wait returns how long an attempt must wait.
func (t *loginThrottle) wait(a attempt) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Until(t.failures[a].until)
}

// begin begins an attempt, or returns how long it must wait. After ten failures an
// attempt is counted as a failure before it is checked, so that others at the same
// time must wait.
func (t *loginThrottle) begin(a attempt) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.recent(a)
	if wait := time.Until(f.until); wait > 0 {
		return wait
	}
	if f.count >= freeFailures {
		t.add(a, f)
	}
	return 0
}

// end forgets all failures after a success. It counts a failure up to the tenth;
// later ones were counted by begin.
func (t *loginThrottle) end(a attempt, success bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch f := t.recent(a); {
	case success:
		delete(t.failures, a)
	case f.count < freeFailures:
		t.add(a, f)
	}
}

// recent returns no failures an hour after the last wait.
func (t *loginThrottle) recent(a attempt) failures {
	f := t.failures[a]
	if time.Since(f.until) > time.Hour {
		return failures{}
	}
	return f
}

func (t *loginThrottle) add(a attempt, f failures) {
	const limit = 50_000 // some 20 MB; then all are forgotten
	if _, known := t.failures[a]; !known && len(t.failures) >= limit {
		clear(t.failures)
	}
	f.count++
	f.until = time.Now().Add(waitAfter(f.count))
	t.failures[a] = f
}

// waitAfter is 30 seconds after ten failures, and doubles up to 15 minutes.
func waitAfter(failures int) time.Duration {
	if failures < freeFailures {
		return 0
	}
	return min(30*time.Second<<min(failures-freeFailures, 5), 15*time.Minute)
}

// activeUser returns the user of an access token that was not logged out.
func (s *store) activeUser(token tokenID) (user, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	a, known := s.accounts[token.UserID]
	if _, loggedOut := s.loggedOut[token]; loggedOut || !known {
		return user{}, false
	}
	return a.user, true
}

// session returns the session with a key, and its user.
func (s *store) session(key string) (session, user, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if found, ok := s.sessions[key]; ok {
		return *found, s.accounts[found.UserID].user, true
	}
	return session{}, user{}, false
}

// freeExpiry returns the last second after now and up to latest in which no
// logged-out token of the user expires.
func (s *store) freeExpiry(userID string, now, latest int64) (expires int64, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for expires = latest; expires > now; expires-- {
		if _, taken := s.loggedOut[tokenID{userID, expires}]; !taken {
			return expires, true
		}
	}
	return 0, false
}

// addSession applies a login. Which sessions have expired depends on the times in
// the changes alone, so that a replay has the same result.
func (m *memory) addSession(s *session) error {
	a := m.accounts[s.UserID]
	if m.sessions[s.Key] != nil || a == nil {
		return errInconsistent
	}
	for _, old := range slices.Clone(a.sessions) {
		if old.Expires <= s.Start {
			m.endSession(old)
		}
	}
	if len(a.sessions) >= maxSessions {
		m.endSession(a.sessions[0])
	}
	m.sessions[s.Key] = s
	a.sessions = append(a.sessions, s)
	return nil
}

// logOut applies a logout. There may be no session to end.
func (m *memory) logOut(l logout) error {
	if m.accounts[l.UserID] == nil {
		return errInconsistent
	}
	if s := m.sessions[l.Key]; s != nil && s.UserID == l.UserID {
		m.endSession(s)
	}
	m.loggedOut[l.tokenID] = struct{}{}
	return nil
}

func (m *memory) endSession(s *session) {
	delete(m.sessions, s.Key)
	a := m.accounts[s.UserID]
	a.sessions = slices.DeleteFunc(a.sessions, func(other *session) bool { return other == s })
}
