package main

import (
	"crypto/md5"
	"encoding/hex"
	"errors"
	"net/http"
	"net/mail"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A user is someone who signed up. No answer is made of it, so that the hash
// cannot get out.
type user struct {
	ID       string `json:"id"`
	Email    string `json:"email"` // as given; another's in lower case is never the same
	Name     string `json:"name"`
	Password string `json:"password"` // see hashPassword
}

var errEmailTaken = errors.New("there is a user with this e-mail already")

// signUp answers POST /users.
func (s *server) signUp(w http.ResponseWriter, r *http.Request) error {
	in, err := readInput(r)
	if err != nil {
		return err
	}
	u := user{Email: in.email("email"), Name: in.text("name", 255)}
	password := in.newPassword("password")
	if err := in.err(); err != nil {
		return err
	}
	if _, taken := s.store.userByEmail(u.Email); taken {
		return errEmailTaken // before the work of a hash
	}
	if u.Password, err = s.hashPassword(r.Context(), password); err != nil {
		return err
	}
	u.ID = s.store.newID()
	refreshToken, session := s.newSession(u)
	if err := s.store.signUp(u, session); err != nil {
		return err
	}
	return s.writeTokens(w, http.StatusCreated, u, refreshToken)
}

// me answers GET /me.
func (s *server) me(w http.ResponseWriter, _ *http.Request, u user) error {
	return writeJSON(w, http.StatusOK, struct {
		Email     string `json:"email"`
		Name      string `json:"name"`
		AvatarURL string `json:"avatar_url"`
	}{u.Email, u.Name, avatarURL(u.Email)})
}

// avatarURL is the picture that Gravatar has for an e-mail, or its mystery
// man (https://docs.gravatar.com/api/avatars/images/).
func avatarURL(email string) string {
	sum := md5.Sum([]byte(strings.ToLower(email)))
	return "https://www.gravatar.com/avatar/" + hex.EncodeToString(sum[:]) + "?d=mm&s=200"
}

// maxEmail is the longest address that SMTP can carry, in bytes (RFC 5321
// §4.5.3.1.3, less its angle brackets).
const maxEmail = 254

// email reads a bare address, such as jack-black@codementor.io.
func (in *input) email(name string) string {
	email := in.text(name, maxEmail)
	address, err := mail.ParseAddress(email)
	_, domain, _ := strings.Cut(email, "@")
	if err != nil || address.Address != email || !isHost(domain) || !isASCII(email) {
		in.fail(name, "must be an e-mail address")
	}
	return email
}

func isASCII(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r > unicode.MaxASCII })
}

func isHost(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool {
		return r != '-' && r != '.' && !unicode.IsLetter(r) && !unicode.IsDigit(r)
	})
}

const maxPassword = 1024 // bytes

// newPassword reads a password by the rules of the API document. It is not
// trimmed.
func (in *input) newPassword(name string) string {
	password := in.secret(name, maxPassword)
	if utf8.RuneCountInString(password) < 8 ||
		!strings.ContainsFunc(password, unicode.IsUpper) ||
		!strings.ContainsFunc(password, unicode.IsLower) ||
		!strings.ContainsFunc(password, unicode.IsNumber) {
		in.fail(name, "must have at least 8 characters, among them an upper-case letter, a lower-case letter and a number")
	}
	return password
}

// addUser applies a sign-up.
func (m *memory) addUser(u user) error {
	email := strings.ToLower(u.Email)
	if _, taken := m.emails[email]; taken {
		return errEmailTaken
	}
	if _, twice := m.users[u.ID]; twice || !isID(u.ID) || email == "" {
		return errContradiction
	}
	m.users[u.ID] = u
	m.emails[email] = u.ID
	m.sawID(u.ID)
	return nil
}
