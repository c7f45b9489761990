package main

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxSessions is how many sessions a user can have; one more ends the oldest.
const maxSessions = 100

// A session lasts from a sign-up or login until it is logged out or expires. Its
// refresh token is known to the client alone.
type session struct {
	Key     string `json:"key"` // SHA-256 of the refresh token, in hex
	UserID  string `json:"user"`
	Start   int64  `json:"start"`   // Unix time
	Expires int64  `json:"expires"` // Unix time
}

// A tokenID identifies an access token. Tokens of a user that expire in the same
// second count as one.
type tokenID struct {
	UserID  string `json:"user"`
	Expires int64  `json:"exp"` // Unix time
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

// errWrongLogin and errRefreshToken are not a 401: clients respond to a 401 with a
// refresh, and would do so forever. RFC 6749 §5.2 wants a 400, too.
var (
	errWrongLogin   = &apiError{status: http.StatusBadRequest, Reason: "wrong e-mail or password"}
	errRefreshToken = &apiError{status: http.StatusBadRequest, Reason: "the refresh token is unknown, expired or logged out"}
	errNoExpiry     = &apiError{status: http.StatusServiceUnavailable, retryAfter: 1, Reason: "too many logouts in a short time; please try again"}
)

// A tokenResponse has a client's tokens.
type tokenResponse struct {
	JWT          string `json:"jwt"`
	RefreshToken string `json:"refresh_token,omitempty"`
}

// refresh responds to POST /access-tokens/refresh.
func (s *server) refresh(w http.ResponseWriter, r *http.Request) error {
	in := readBody(r)
	token := in.secret("refresh_token", maxBody) // that is, of any length
	if err := in.err(); err != nil {
		return err
	}
	found, u, ok := s.store.session(hashToken(token))
	if !ok || time.Now().Unix() >= found.Expires {
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
	in := readBody(r)
	email := in.text("email", maxBody) // not validated: an invalid one is unknown
	password := in.secret("password", maxPassword)
	if err := in.err(); err != nil {
		return err
	}
	u, err := s.checkPassword(r, email, password)
	if err != nil {
		return err
	}
	return s.startSession(w, u, change{})
}

// logOut responds to DELETE /access-tokens. The refresh token comes in the query
// or in the body.
func (s *server) logOut(w http.ResponseWriter, r *http.Request, c caller) error {
	query := r.URL.Query()
	in := newInput(toJSON(query), nil)
	if query.Get("refresh_token") == "" {
		in = readBody(r)
	}
	token := in.secret("refresh_token", maxBody)
	if err := in.err(); err != nil {
		return err
	}
	if err := s.store.commit(change{Logout: &logout{c.token, hashToken(token)}}); err != nil {
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
		Key: hashToken(refreshToken), UserID: u.ID, Start: now.Unix(), Expires: now.Add(s.options.refreshTTL).Unix(),
	}
	if err := s.store.commit(c); err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, tokenResponse{token, refreshToken})
}

// newAccessToken makes a token. It expires in another second than every logged-out
// token of the user: in the same second, it would be the same token.
func (s *server) newAccessToken(u user) (string, error) {
	now := time.Now()
	expires, ok := s.store.freeExpiry(u.ID, now.Unix(), now.Add(s.options.accessTTL).Unix())
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

// checkPassword returns the user who has this e-mail and password. An unknown
// e-mail costs one hash, as a wrong password does, so that the time does not tell
// them apart. Each attempt holds a slot from its look at the throttle until it is noted
// there. So in a burst, no more attempts than there are slots can miss a new wait.
func (s *server) checkPassword(r *http.Request, email, password string) (user, error) {
	u, known := s.store.userByEmail(email)
	if !known {
		u.Password = dummyHash(s.hashCost)
	}
	if err := s.hashing.acquire(r.Context()); err != nil {
		return user{}, err
	}
	defer s.hashing.release()
	a := newAttempt(s.clientAddr(r), email)
	if wait := s.throttle.wait(a); wait > 0 {
		return user{}, throttled(wait)
	}
	right := matches(password, u.Password)
	s.throttle.note(a, right)
	if !right {
		return user{}, errWrongLogin
	}
	return u, nil
}

func throttled(wait time.Duration) error {
	seconds := int((wait + time.Second - 1) / time.Second) // rounded up
	reason := fmt.Sprintf("too many failed logins; please try again in %d seconds", seconds)
	return &apiError{status: http.StatusTooManyRequests, retryAfter: seconds, Reason: reason}
}

// A loginThrottle slows down attacks on passwords: after ten failures, an attempt
// must wait, and each further failure doubles the wait. Other people log in as usual.
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

func newAttempt(client netip.Addr, email string) attempt {
	bits := 32
	if client.Is6() {
		bits = 64 // one subnet (RFC 4291 §2.5.1)
	}
	prefix, _ := client.Prefix(bits)
	return attempt{sha256.Sum256([]byte(normalizeEmail(email))), prefix}
}

// clientAddr returns the address of the client. Behind a proxy, this is the last one
// in the last X-Forwarded-For, which the proxy added: a client could have sent the
// others.
func (s *server) clientAddr(r *http.Request) netip.Addr {
	if lines := r.Header["X-Forwarded-For"]; s.options.trustProxy && len(lines) > 0 {
		list := strings.Split(lines[len(lines)-1], ",")
		if addr, err := parseAddr(strings.TrimSpace(list[len(list)-1])); err == nil {
			return addr
		}
	}
	addr, _ := parseAddr(r.RemoteAddr)
	return addr
}

// parseAddr parses an address with or without a port and brackets.
func parseAddr(s string) (netip.Addr, error) {
	if withPort, err := netip.ParseAddrPort(s); err == nil {
		return withPort.Addr().WithZone("").Unmap(), nil
	}
	addr, err := netip.ParseAddr(strings.Trim(s, "[]"))
	return addr.WithZone("").Unmap(), err
}

// wait returns how long an attempt must wait.
func (t *loginThrottle) wait(a attempt) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Until(t.failures[a].until)
}

// note counts a failure. A success, or an hour after the last wait, resets the count.
func (t *loginThrottle) note(a attempt, success bool) {
	const limit = 50_000 // attempts, some 20 MB; then all are forgotten
	t.mu.Lock()
	defer t.mu.Unlock()
	if success {
		delete(t.failures, a)
		return
	}
	f, known := t.failures[a]
	if !known && len(t.failures) >= limit {
		clear(t.failures)
	}
	if time.Since(f.until) > time.Hour {
		f.count = 0
	}
	f.count++
	f.until = time.Now().Add(waitAfter(f.count))
	t.failures[a] = f
}

// waitAfter is 30 seconds after ten failures, and doubles up to 15 minutes.
func waitAfter(count int) time.Duration {
	if count < 10 {
		return 0
	}
	return min(30*time.Second*(1<<min(count-10, 5)), 15*time.Minute)
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
// the changes alone, so that a start, which applies them again, has the same result.
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

// endToken applies a logout. There may be no session to end.
func (m *memory) endToken(l logout) error {
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
