package main

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/mail"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxEmail    = 254  // bytes; the longest address that SMTP can carry (RFC 5321 §4.5.3.1.3, less its angle brackets)
	maxName     = 255  // characters
	maxPassword = 1024 // bytes
)

// A user is someone who signed up. It is never sent to a client as a whole, so
// that the hash cannot leak.
type user struct {
	ID       string `json:"id"`
	Email    string `json:"email"` // as given; unique in lower case
	Name     string `json:"name"`
	Password string `json:"password"` // a hash; see hashPassword
}

var errEmailTaken = errors.New("this e-mail is already registered")

// validate checks what nobody else may rely on without it: a user comes from a
// handler or from FILE.
func (u *user) validate() error {
	if !idShape.MatchString(u.ID) || !isEmail(u.Email) {
		return fmt.Errorf("user %q: the id or the e-mail is invalid", u.ID)
	}
	return nil
}

// signUp responds to POST /users.
func (s *server) signUp(w http.ResponseWriter, r *http.Request) error {
	in := readBody(w, r)
	u := user{Email: in.email("email"), Name: in.text("name", maxName)}
	password := in.newPassword("password")
	if err := in.err(); err != nil {
		return err
	}
	if _, taken := s.store.userByEmail(u.Email); taken {
		return errEmailTaken // before the work of a hash
	}
	hash, err := s.hashPassword(r.Context(), password)
	if err != nil {
		return err
	}
	u.ID, u.Password = s.store.ids.next(), hash
	return s.startSession(w, u, change{User: &u})
}

// me responds to GET /me.
func (s *server) me(w http.ResponseWriter, _ *http.Request, u user) error {
	return writeJSON(w, http.StatusOK, struct {
		Email     string `json:"email"`
		Name      string `json:"name"`
		AvatarURL string `json:"avatar_url"`
	}{u.Email, u.Name, avatarURL(u.Email)})
}

// avatarURL returns the URL of the Gravatar for an e-mail, or of a mystery man
// (https://docs.gravatar.com/api/avatars/images/).
func avatarURL(email string) string {
	sum := md5.Sum([]byte(strings.ToLower(email)))
	return "https://www.gravatar.com/avatar/" + hex.EncodeToString(sum[:]) + "?d=mm&s=200"
}

// emailShape is required in addition to the rules of net/mail: ASCII without
// spaces, and a domain of letters, digits, hyphens and dots.
var emailShape = regexp.MustCompile(`^[!-~]+@[A-Za-z0-9.-]+$`)

// isEmail reports whether somebody can sign up with an e-mail. It must be a bare
// address, such as jack-black@codementor.io.
func isEmail(email string) bool {
	if len(email) > maxEmail { // before the work of parsing
		return false
	}
	address, err := mail.ParseAddress(email)
	return err == nil && address.Address == email && emailShape.MatchString(email)
}

// normalizeEmail returns the form in which e-mails are compared: lower case. An
// invalid one is returned unchanged: in lower case, U+212A (Kelvin) would become k.
func normalizeEmail(email string) string {
	if isEmail(email) {
		return strings.ToLower(email)
	}
	return email
}

// email reads the e-mail of a new user.
func (in *input) email(name string) string {
	email := in.text(name, maxEmail)
	if !isEmail(email) {
		in.reject(name, "must be an e-mail address")
	}
	return email
}

// newPassword reads a password by the rules of the API document. It is not
// trimmed.
func (in *input) newPassword(name string) string {
	password := in.secret(name, maxPassword)
	if utf8.RuneCountInString(password) < 8 ||
		!strings.ContainsFunc(password, unicode.IsUpper) ||
		!strings.ContainsFunc(password, unicode.IsLower) ||
		!strings.ContainsFunc(password, unicode.IsNumber) {
		in.reject(name, "must have at least 8 characters, including an upper-case letter, a lower-case letter and a number")
	}
	return password
}

func (s *store) userByEmail(email string) (user, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if a, known := s.emails[normalizeEmail(email)]; known {
		return a.user, true
	}
	return user{}, false
}

// addUser applies a sign-up. In a snapshot, the sessions of a user are separate
// changes.
func (m *memory) addUser(u user, first *session) error {
	email := strings.ToLower(u.Email)
	if m.emails[email] != nil {
		return errEmailTaken
	}
	if m.accounts[u.ID] != nil {
		return errInconsistent
	}
	a := &account{user: u}
	m.accounts[u.ID], m.emails[email] = a, a
	m.ids.skip(u.ID)
	if first == nil {
		return nil
	}
	return m.addSession(first)
}

// An input is what a client sent: the members of a JSON object, a form or a query.
// Each is read by the rule of its field. After that, err returns everything that
// is wrong.
type input struct {
	members map[string]any
	bodyErr error // why there are no members
	invalid fieldErrors
}

func newInput(members map[string]any, err error) *input {
	return &input{members: members, bodyErr: err, invalid: make(fieldErrors)}
}

// readQuery reads one member of the query, which is "" if it is missing.
func readQuery(r *http.Request, name string) *input {
	values := append(queryValues(r.URL.RawQuery, name), "")
	if len(values) > 2 {
		return newInput(nil, fmt.Errorf("%s %w", name, errDuplicate))
	}
	return newInput(map[string]any{name: values[0]}, nil)
}

// queryValues returns the values that a name has in a query. The rest of the query
// makes no difference, even if it is malformed; url.ParseQuery would not say which
// pair is malformed.
func queryValues(query, name string) (values []string) {
	for pair := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		if key, _ = url.QueryUnescape(key); key == name {
			value, _ = url.QueryUnescape(value)
			values = append(values, value)
		}
	}
	return values
}

func readBody(w http.ResponseWriter, r *http.Request) *input { return newInput(parseBody(w, r)) }

// parseBody reads a JSON object or a form. A DELETE may have no body.
func parseBody(w http.ResponseWriter, r *http.Request) (map[string]any, error) {
	mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	mediaType = strings.ToLower(strings.TrimSpace(mediaType))
	isForm := mediaType == "application/x-www-form-urlencoded"
	switch {
	case r.Method == http.MethodDelete && r.ContentLength == 0:
		return nil, nil
	case !isForm && mediaType != "application/json" && mediaType != "":
		return nil, errMediaType
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, errTooLarge
	} else if err != nil {
		return nil, errBody // it did not arrive as a whole
	}
	if isForm && !bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{")) { // as curl -d '{…}' sends it
		return parseForm(string(body))
	}
	return parseObject(body)
}

// parseObject reads one JSON object, member by member: json.Unmarshal accepts
// invalid UTF-8 and duplicate names. (In Go 1.27, encoding/json/v2 rejects both.)
func parseObject(body []byte) (map[string]any, error) {
	members := make(map[string]any)
	if !json.Valid(body) || !utf8.Valid(body) {
		return nil, errBody
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	if start, _ := dec.Token(); start != json.Delim('{') {
		return nil, errBody
	}
	for dec.More() {
		token, _ := dec.Token() // the body is valid
		name := token.(string)
		if _, known := members[name]; known {
			return nil, fmt.Errorf("%s %w", name, errDuplicate)
		}
		var value any
		dec.Decode(&value)
		members[name] = value
	}
	return members, nil
}

// parseForm reads a form.
func parseForm(form string) (map[string]any, error) {
	values, err := url.ParseQuery(form)
	if err != nil {
		return nil, errForm
	}
	members := make(map[string]any)
	for name, all := range values {
		if len(all) > 1 {
			return nil, fmt.Errorf("%s %w", name, errDuplicate)
		}
		members[name] = all[0]
	}
	return members, nil
}

// text reads 1 to limit characters, after trimming.
func (in *input) text(name string, limit int) string {
	s := strings.TrimSpace(in.string(name))
	in.check(name, s, utf8.RuneCountInString(s), limit, "characters")
	return s
}

// secret reads 1 to limit bytes as they are, without trimming.
func (in *input) secret(name string, limit int) string {
	s := in.string(name)
	in.check(name, s, len(s), limit, "bytes")
	return s
}

func (in *input) string(name string) string {
	value, given := in.members[name]
	s, isText := value.(string)
	if !given {
		in.reject(name, "must be given")
	} else if !isText {
		in.reject(name, "must be text")
	}
	return s
}

// check rejects text of the wrong length, control characters that a text area
// does not send, and U+FFFD: encoding/json puts it in place of what is not
// Unicode, so that two passwords could become one.
func (in *input) check(name, s string, length, limit int, unit string) {
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
	n, err := strconv.ParseUint(fmt.Sprint(value), 10, 16)
	if !given {
		in.reject(name, "must be given")
	} else if err != nil || n < 1 || int(n) > limit {
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
	if in.bodyErr != nil || len(in.invalid) == 0 {
		return in.bodyErr
	}
	return in.invalid
}

// fieldErrors maps each invalid field to the rule that it breaks.
type fieldErrors map[string]string

func (e fieldErrors) Error() string {
	var words []string
	for _, name := range slices.Sorted(maps.Keys(e)) {
		words = append(words, name+" "+e[name])
	}
	return strings.Join(words, "; ")
}
