package main

import (
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
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/argon2"
)

// A session lasts from a sign-up or log-in until it is logged out or expires, or a
// hundred others have begun. Its refresh token is known to the client alone.
type session struct {
	Key     string `json:"key"` // SHA-256 of the refresh token, in hex
	UserID  serial `json:"user"`
	Start   int64  `json:"start"`   // seconds since 1970
	Expires int64  `json:"expires"` // seconds since 1970
}

var (
	errWrongLogIn   = errors.New("wrong e-mail or password")
	errRefreshToken = errors.New("the refresh token is unknown, expired or logged out")
	errBusy         = errors.New("too many people are logging in just now; try again in a moment")
)

// refresh answers POST /access-tokens/refresh. A refresh token that is no good
// is a 400, as for any token endpoint (RFC 6749 §5.2); clients answer a 401
// with a refresh, for ever.
func (s *server) refresh(w http.ResponseWriter, r *http.Request) error {
	in := readInput(r)
	token := in.secret("refresh_token", maxBody)
	if err := in.err(); err != nil {
		return err
	}
	session, u, ok := s.store.session(keyOf(token))
	if !ok || time.Now().Unix() >= session.Expires {
		return errRefreshToken
	}
	return s.writeTokens(w, http.StatusOK, u, "")
}

// logIn answers POST /access-tokens.
func (s *server) logIn(w http.ResponseWriter, r *http.Request) error {
	in := readInput(r)
	email := in.text("email", maxEmail)
	password := in.secret("password", maxPassword)
	if err := in.err(); err != nil {
		return err
	}
	u, err := s.authenticate(r, email, password)
	if err != nil {
		return err
	}
	return s.startSession(w, u, change{})
}

// authenticate finds the user who has this e-mail and password. An unknown
// e-mail costs the same hash as a wrong password, so that time does not tell
// them apart.
func (s *server) authenticate(r *http.Request, email, password string) (user, error) {
	who := guesserOf(r, email)
	if err := s.guesses.mustWait(who); err != nil {
		return user{}, err
	}
	u, known := s.store.userByEmail(email)
	if !known {
		u.Password = noPassword
	}
	err := s.hashing.do(r.Context(), func() error {
		if err := s.guesses.begin(who); err != nil {
			return err // those before in the line have failed
		}
		right := isPassword(password, u.Password)
		if s.guesses.end(who, right); !right {
			return errWrongLogIn
		}
		return nil
	})
	return u, err
}

// logOut answers DELETE /access-tokens. It ends the refresh token that is
// given, in the query or the body, and the access token that it came with.
func (s *server) logOut(w http.ResponseWriter, r *http.Request, u user) error {
	read := readInput
	if r.URL.Query().Get("refresh_token") != "" {
		read = readQuery
	}
	in := read(r)
	token := in.secret("refresh_token", maxBody)
	if err := in.err(); err != nil {
		return err
	}
	if ended, _, _ := s.store.session(keyOf(token)); ended.UserID == u.ID {
		if err := s.store.commit(change{LogOut: &ended}); err != nil {
			return err
		}
	}
	s.tokens.revoke(accessToken(r.Header))
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// startSession begins a session of u in the same change as c, and answers its
// tokens.
func (s *server) startSession(w http.ResponseWriter, u user, c change) error {
	random := make([]byte, 50)
	rand.Read(random) // never fails
	refreshToken, now := hex.EncodeToString(random), time.Now()
	c.Session = &session{
		Key: keyOf(refreshToken), UserID: u.ID, Start: now.Unix(), Expires: now.Add(s.refreshTTL).Unix(),
	}
	if err := s.store.commit(c); err != nil {
		return err
	}
	return s.writeTokens(w, http.StatusCreated, u, refreshToken)
}

// writeTokens answers a new access token and, unless it is empty, the refresh
// token.
func (s *server) writeTokens(w http.ResponseWriter, status int, u user, refreshToken string) error {
	token, err := s.tokens.sign(claims{UserID: u.ID, Email: u.Email, Name: u.Name})
	if err != nil {
		return err
	}
	return writeJSON(w, status, struct {
		JWT          string `json:"jwt"`
		RefreshToken string `json:"refresh_token,omitempty"`
	}{token, refreshToken})
}

// keyOf is what the store knows of a refresh token. It needs no salt: nobody
// can guess 50 random bytes.
func keyOf(refreshToken string) string {
	sum := sha256.Sum256([]byte(refreshToken))
	return hex.EncodeToString(sum[:])
}

// caller returns the user whose access token came with the request.
func (s *server) caller(r *http.Request) (user, error) {
	c, err := s.tokens.verify(accessToken(r.Header))
	if err != nil {
		return user{}, err
	}
	u, ok := s.store.user(c.UserID)
	if !ok {
		return user{}, errToken
	}
	return u, nil
}

// accessToken returns the token in X-Access-Token, or else in Authorization
// (RFC 6750 §2.1), there after the word Bearer, in any case (RFC 9110 §11.1).
// A header that comes twice holds none. X-Access-Token may have the word, too.
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

// jwks answers GET /.well-known/jwks.json (RFC 7517 §5): with it others can
// verify tokens, and not make them, which is what RS256 is for.
func (s *server) jwks(w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]any{"keys": []any{s.tokens.jwk()}})
}

// The cost of a hash is what OWASP's Password Storage Cheat Sheet asks for:
// 19 MiB, and some 20 ms. It stands in each hash, so that it can be raised here.
const (
	argonMemory  = 19_456 // KiB
	argonPasses  = 2
	argonThreads = 1
)

// noPassword costs as much as any hash, and is that of no password.
const noPassword = "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

// hashPassword makes what is kept of a password.
func (s *server) hashPassword(ctx context.Context, password string) (hash string, err error) {
	err = s.hashing.do(ctx, func() error {
		salt := make([]byte, 16)
		rand.Read(salt) // never fails
		hash = argonHash(password, salt, argonMemory, argonPasses, argonThreads)
		return nil
	})
	return hash, err
}

// argonHash is in the PHC string format (https://github.com/P-H-C/phc-string-format).
func argonHash(password string, salt []byte, memory, passes uint32, threads uint8) string {
	sum := argon2.IDKey([]byte(password), salt, passes, memory, threads, 32)
	encode := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s",
		argon2.Version, memory, passes, threads, encode(salt), encode(sum))
}

// isPassword makes the hash again, with the salt and the cost of the old one.
func isPassword(password, hash string) bool {
	var (
		memory, passes uint32
		threads        uint8
	)
	parts := strings.Split(hash, "$") // "", argon2id, v=19, the cost, salt, sum
	if len(parts) != 6 {
		return false
	}
	_, err1 := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &memory, &passes, &threads)
	salt, err2 := base64.RawStdEncoding.DecodeString(parts[4])
	if err1 != nil || err2 != nil || passes < 1 || threads < 1 {
		return false
	}
	again := argonHash(password, salt, memory, passes, threads)
	return subtle.ConstantTimeCompare([]byte(again), []byte(hash)) == 1
}

// A gate lets few hashes be computed at a time, and few people wait for it.
// With no gate, 48 people who log in at once stop everybody else, and take
// 1 GB of memory.
type gate struct {
	line  chan struct{} // all who are in, at work or waiting
	slots chan struct{} // those at work
}

func newGate(slots, waiting int) gate {
	return gate{line: make(chan struct{}, slots+waiting), slots: make(chan struct{}, slots)}
}

// do runs work as soon as there is a slot. It returns errBusy if the line is
// full or the wait too long.
func (g gate) do(ctx context.Context, work func() error) error {
	select {
	case g.line <- struct{}{}:
		defer func() { <-g.line }()
	default:
		return errBusy
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	select {
	case g.slots <- struct{}{}:
		defer func() { <-g.slots }()
		if runtime.GOMAXPROCS(0) == 1 {
			// Go would let work have the only core for 10 ms at a time. With a second
			// thread for all else, the kernel shares it out fairly. Then 1 again, as
			// two cost each request a tenth.
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
		}
		return work()
	case <-ctx.Done(): // also when the client has gone
		return errBusy
	}
}

// guesses throttles failed log-ins: after ten, a guesser must wait, and has one
// attempt at a time; each further failure doubles the wait. Others log in as
// usual.
type guesses struct {
	mu   sync.Mutex
	made map[guesser]failures
}

// A guesser is somebody at one address who tries one e-mail, known or not.
type guesser struct {
	email  string
	client netip.Prefix
}

type failures struct {
	count int
	until time.Time // no attempt before
}

// guesserOf goes by the address of the connection: what a client says of
// itself, as in X-Forwarded-For, would be a way around.
func guesserOf(r *http.Request, email string) guesser {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	addr, bits := from.Addr(), 32
	if addr.Is6() {
		bits = 64 // what one household has (RFC 6177)
	}
	client, _ := addr.Prefix(bits)
	return guesser{strings.ToLower(email), client}
}

// A throttledError is the number of seconds that a guesser has yet to wait.
type throttledError int

func (e throttledError) Error() string {
	return fmt.Sprintf("too many failed log-ins; try again in %d seconds", int(e))
}

// mustWait returns a throttledError while the guesser must wait.
func (g *guesses) mustWait(who guesser) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.made[who].mustWait()
}

// begin begins an attempt, or returns a throttledError. After ten failures the
// attempt counts as one more in advance, so that others beside it have to wait.
func (g *guesses) begin(who guesser) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	f := g.recent(who)
	if err := f.mustWait(); err != nil {
		return err
	}
	if f.count >= freeGuesses {
		g.add(who, f)
	}
	return nil
}

// end forgets all failures after a right attempt, and counts a wrong one up to the
// tenth; those after it begin has counted.
func (g *guesses) end(who guesser, right bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch f := g.recent(who); {
	case right:
		delete(g.made, who)
	case f.count < freeGuesses:
		g.add(who, f)
	}
}

// recent forgets the failures an hour after the last wait.
func (g *guesses) recent(who guesser) failures {
	f := g.made[who]
	if time.Since(f.until) > time.Hour {
		return failures{}
	}
	return f
}

func (g *guesses) add(who guesser, f failures) {
	const limit = 50_000 // 20 MB; then all are forgotten
	if _, known := g.made[who]; !known && len(g.made) >= limit {
		clear(g.made)
	}
	f.count++
	f.until = time.Now().Add(waitAfter(f.count))
	g.made[who] = f
}

func (f failures) mustWait() error {
	if wait := time.Until(f.until); wait > 0 {
		return throttledError(math.Ceil(wait.Seconds()))
	}
	return nil
}

const freeGuesses = 10

// waitAfter is 30 seconds after ten failures, and doubles up to 15 minutes.
func waitAfter(failures int) time.Duration {
	if failures < freeGuesses {
		return 0
	}
	return min(30*time.Second<<min(failures-freeGuesses, 5), 15*time.Minute)
}

// maxSessions is how many a user can have; then the oldest ends.
const maxSessions = 100

// addSession applies a log-in. What has expired goes by the times in the
// records, so that a recovery gives the same result.
func (m *memory) addSession(s session) error {
	_, twice := m.sessions[s.Key]
	if _, known := m.users[s.UserID]; twice || !known {
		return errContradiction
	}
	mine := m.logIns[s.UserID]
	for len(mine) > 0 && (len(mine) >= maxSessions || m.sessions[mine[0]].Expires <= s.Start) {
		delete(m.sessions, mine[0])
		mine = mine[1:]
	}
	m.sessions[s.Key] = s
	m.logIns[s.UserID] = append(mine, s.Key)
	return nil
}

// removeSession applies a log-out. There may be nothing to end.
func (m *memory) removeSession(userID serial, key string) {
	if m.sessions[key].UserID == userID {
		delete(m.sessions, key)
		m.logIns[userID] = slices.DeleteFunc(m.logIns[userID], func(k string) bool { return k == key })
	}
}
