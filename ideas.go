package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxContent = 255 // characters
	maxScore   = 10
	pageSize   = 10 // ideas
)

// An idea is what clients see.
type idea struct {
	ID         string      `json:"id"`
	Content    string      `json:"content"`
	Impact     int         `json:"impact"`
	Ease       int         `json:"ease"`
	Confidence int         `json:"confidence"`
	Average    json.Number `json:"average_score"`
	Created    int64       `json:"created_at"` // Unix time
}

// A storedIdea is an idea and its owner. Once it is committed, it is never changed,
// only replaced, so it can be read without a lock.
type storedIdea struct {
	Owner string `json:"owner"` // a user id
	Idea  idea   `json:"idea"`
	json  []byte // of Idea; encode makes it, once
}

// An ideaKey identifies an idea of its owner.
type ideaKey struct {
	Owner string `json:"owner"`
	ID    string `json:"id"`
}

var errNoIdea = &apiError{status: http.StatusNotFound, Reason: "you have no such idea"}

// createIdea responds to POST /ideas.
func (s *server) createIdea(w http.ResponseWriter, r *http.Request, c caller) error {
	i, err := readIdea(r, c)
	if err != nil {
		return err
	}
	i.Idea.ID, i.Idea.Created = s.store.ids.next(), time.Now().Unix()
	if err := s.store.commit(change{Create: i}); err != nil {
		return err
	}
	writeBody(w, http.StatusCreated, i.json)
	return nil
}

// deleteIdea responds to DELETE /ideas/{id}.
func (s *server) deleteIdea(w http.ResponseWriter, r *http.Request, c caller) error {
	key := ideaKey{Owner: c.ID, ID: r.PathValue("id")}
	if _, err := s.store.idea(key); err != nil {
		return err
	}
	if err := s.store.commit(change{Delete: &key}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// listIdeas responds to GET /ideas with one page.
func (s *server) listIdeas(w http.ResponseWriter, r *http.Request, c caller) error {
	page, err := readPage(r)
	if err != nil {
		return err
	}
	list, total := s.store.pageOfIdeas(c.ID, page)
	w.Header().Set("Link", links(page, total))
	writeBody(w, http.StatusOK, list)
	return nil
}

// updateIdea responds to PUT /ideas/{id}.
func (s *server) updateIdea(w http.ResponseWriter, r *http.Request, c caller) error {
	i, err := readIdea(r, c)
	if err != nil {
		return err
	}
	old, err := s.store.idea(ideaKey{Owner: c.ID, ID: r.PathValue("id")})
	if err != nil {
		return err
	}
	i.Idea.ID, i.Idea.Created = old.Idea.ID, old.Idea.Created
	if err := s.store.commit(change{Update: i}); err != nil {
		return err
	}
	writeBody(w, http.StatusOK, i.json)
	return nil
}

// readIdea reads the fields of an idea that a client may set.
func readIdea(r *http.Request, c caller) (*storedIdea, error) {
	in := readBody(r)
	i := idea{
		Content:    in.text("content", maxContent),
		Impact:     in.integer("impact", maxScore),
		Ease:       in.integer("ease", maxScore),
		Confidence: in.integer("confidence", maxScore),
	}
	return &storedIdea{Owner: c.ID, Idea: i}, in.err()
}

func (i *idea) scores() []int { return []int{i.Impact, i.Ease, i.Confidence} }

func (i *idea) sum() (sum int) {
	for _, score := range i.scores() {
		sum += score
	}
	return sum
}

// average returns the shortest form of the float64, always with a decimal point: 8.0,
// 6.333333333333333.
func (i *idea) average() json.Number {
	average := float64(i.sum()) / float64(len(i.scores()))
	text := strconv.FormatFloat(average, 'f', -1, 64)
	if !strings.Contains(text, ".") {
		text += ".0"
	}
	return json.Number(text)
}

// encode checks an idea, and makes its average and its JSON.
func (i *storedIdea) encode() (err error) {
	scores := i.Idea.scores()
	length := utf8.RuneCountInString(i.Idea.Content)
	if !idShape.MatchString(i.Idea.ID) || length < 1 || length > maxContent || slices.Min(scores) < 1 || slices.Max(scores) > maxScore {
		return fmt.Errorf("idea %q: the id, the content or a score is invalid", i.Idea.ID)
	}
	i.Idea.Average = i.Idea.average()
	i.json, err = json.Marshal(i.Idea)
	return err
}

// readPage reads the number of a page, which is 1 if none is given.
func readPage(r *http.Request) (int, error) {
	query := r.URL.Query()
	if !query.Has("page") {
		return 1, nil
	}
	page, err := strconv.ParseUint(query.Get("page"), 10, strconv.IntSize-1)
	if err != nil || page == 0 {
		return 0, invalidFields(map[string]string{"page": "must be a positive integer"})
	}
	return int(page), nil
}

// links returns the Link header of a page (RFC 8288).
func links(page, total int) string {
	last := max(1, pagesFor(total))
	link := func(page int, relation string) string {
		return "</ideas?page=" + strconv.Itoa(page) + `>; rel="` + relation + `"`
	}
	all := link(1, "first")
	if page > 1 {
		all += ", " + link(min(page-1, last), "prev")
	}
	if page < last {
		all += ", " + link(page+1, "next")
	}
	return all + ", " + link(last, "last")
}

func pagesFor(ideas int) int { return (ideas + pageSize - 1) / pageSize }

// compareIdeas puts higher averages first, then newer ideas. The sum of the
// scores orders ideas as their average does.
func compareIdeas(a, b *storedIdea) int {
	return cmp.Or(cmp.Compare(b.Idea.sum(), a.Idea.sum()), cmp.Compare(b.Idea.ID, a.Idea.ID))
}

func (s *store) idea(key ideaKey) (*storedIdea, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.findIdea(key)
}

// pageOfIdeas returns a page of a user's list, in JSON, and the number of all
// their ideas.
func (s *store) pageOfIdeas(owner string, number int) (page []byte, total int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	ideas := s.accounts[owner].ideas
	if number > pagesFor(len(ideas)) {
		return []byte("[]"), len(ideas)
	}
	from := (number - 1) * pageSize
	page = append(make([]byte, 0, pageSize*200), '[') // most pages fit
	for n, i := range ideas[from:min(from+pageSize, len(ideas))] {
		if n > 0 {
			page = append(page, ',')
		}
		page = append(page, i.json...)
	}
	return append(page, ']'), len(ideas)
}

// findIdea returns errNoIdea also for an idea of somebody else.
func (m *memory) findIdea(key ideaKey) (*storedIdea, error) {
	if i := m.ideas[key.ID]; i != nil && i.Owner == key.Owner {
		return i, nil
	}
	return nil, errNoIdea
}

// addIdea applies a create.
func (m *memory) addIdea(i *storedIdea) error {
	a := m.accounts[i.Owner]
	if m.ideas[i.Idea.ID] != nil || a == nil {
		return errInconsistent
	}
	m.ids.skip(i.Idea.ID)
	m.ideas[i.Idea.ID] = i
	at, _ := slices.BinarySearchFunc(a.ideas, i, compareIdeas)
	a.ideas = slices.Insert(a.ideas, at, i)
	return nil
}

// replaceIdea applies an update.
func (m *memory) replaceIdea(i *storedIdea) error {
	if err := m.removeIdea(ideaKey{Owner: i.Owner, ID: i.Idea.ID}); err != nil {
		return err
	}
	return m.addIdea(i)
}

// removeIdea applies a delete.
func (m *memory) removeIdea(key ideaKey) error {
	i, err := m.findIdea(key)
	if err != nil {
		return err
	}
	delete(m.ideas, key.ID)
	a := m.accounts[key.Owner]
	at, _ := slices.BinarySearchFunc(a.ideas, i, compareIdeas)
	a.ideas = slices.Delete(a.ideas, at, at+1)
	return nil
}
