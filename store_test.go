package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// These tests are about what the store keeps, what FILE looks like, and which files
// a start rejects. A testStore is a store and a model of it: s.must makes changes in
// both. Failures and crashes are in crash_test.go.

// TestKeeps makes a change of each kind, and wants the store to have the same
// contents as the model: at once, after a kill, and after a restart.
func TestKeeps(t *testing.T) {
	s, ann, bob := newTestStore(t, noSync), somebody(1), somebody(2)
	s.must(ann.signUp("a@example.org"), bob.signUp("b@example.org"))
	s.must(ann.logIn("key", 5), ann.logOut("key", 60))
	s.must(ann.create(ideaID(1), "tea", 5), ann.create(ideaID(2), "rain", 6), bob.create(ideaID(3), "snow", 7))
	s.must(ann.update(ideaID(1), "coffee", 8), bob.remove(ideaID(3)))
	s.survivesAKill("at first")
	s.restart()
	s.survivesAKill("after a restart")
}

// TestFormat compares FILE with an example. To write the example anew, run
//
//	go test -run TestFormat -update
func TestFormat(t *testing.T) {
	values, _ := example(t)
	if *update {
		writeFile(t, "testdata/ideapool.json", strings.Join(values, ""))
	}
	compare(t, "FILE (the flag -update writes the example anew)", strings.Join(values, ""), readFile(t, "testdata/ideapool.json"))
	for _, value := range values {
		if !json.Valid([]byte(value)) {
			t.Errorf("jq cannot read the value %s", value)
		}
	}
}

// TestEarlierFiles opens files of the second version of this program: one after a
// kill, and the same one after the next start and stop. That version could also
// write long lines without effect.
func TestEarlierFiles(t *testing.T) {
	killed := readFile(t, "testdata/version2/killed.json")
	stopped := readFile(t, "testdata/version2/stopped.json")
	want := files{dataName: stopped}.read(t, scratch(t))
	compare(t, "after a kill", files{dataName: killed}.read(t, scratch(t)), want)

	probe := laterLine(change{Probe: strings.Repeat("-", 6*64<<10)})
	path := scratch(t)
	files{dataName: withChecksums(header+"]", probe, laterLine(somebody(1).signUp("a@example.org")))}.write(t, path)
	s := startStore(t, path, noSync)
	compare(t, "with a long line", contents(s), after(somebody(1).signUp("a@example.org")))
}

// TestIDsRiseAndNeverRepeat asks for ids in the year 2000, where the clock of
// synctest begins.
func TestIDsRiseAndNeverRepeat(t *testing.T) {
	s := newTestStore(t, noSync)
	check := func(last string, left files) {
		synctest.Test(t, func(t *testing.T) {
			path := scratch(t)
			left.write(t, path)
			s := openTestStore(t, path, realDisk)
			ids := []string{last, s.ids.next(), s.ids.next(), s.ids.next()}
			if !slices.IsSorted(ids) || len(slices.Compact(ids)) < 4 || !idShape.MatchString(ids[3]) {
				t.Errorf("got the ids %v, want them to rise", ids)
			}
		})
	}
	p, gone := person(s.ids.next()), s.ids.next()
	s.must(p.signUp("a@example.org"))
	check(string(p), readFiles(t, s.file.path))
	s.must(p.create(gone, "tea", 5), p.remove(gone))
	for range 3 {
		check(gone, readFiles(t, s.file.path))
		s.restart()
	}
	check(gone, files{dataName: checksum.ReplaceAllString(s.text(), "")})
}

// TestExpiredIsDropped follows a session and an access token that was logged out, until more
// than a day after they expired. Then a compaction drops them.
func TestExpiredIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ann, now := newTestStore(t, noSync), somebody(1), time.Now().Unix()
		token := tokenID{string(ann), now + 600}
		login := session{Key: "short", UserID: string(ann), Start: now, Expires: now + 600}
		s.must(ann.signUp("a@example.org"), change{Session: &login}, change{Logout: &logout{tokenID: token}})
		check := func(when string, last bool) {
			t.Helper()
			s.must(ann.create(ideaID(1), "tea", 5), ann.remove(ideaID(1))) // so that the stop compacts
			s.restart()
			_, active := s.activeUser(token)
			_, _, known := s.session("short")
			inFile := strings.Contains(s.text(), "logout") && strings.Contains(s.text(), "short")
			if active == last || known != last || inFile != last {
				t.Errorf("%s: got an active token: %t, a session: %t, both in FILE: %t", when, active, known, inFile)
			}
			s.survivesAKill(when)
		}
		check("at first", true)
		time.Sleep(600*time.Second + 24*time.Hour)
		check("a day after they expired", true)
		time.Sleep(time.Second)
		clear(s.model[string(ann)].loggedOut)
		s.model[string(ann)].sessions = s.model[string(ann)].sessions[:1] // that of the sign-up
		check("more than a day after they expired", false)
	})
}

// TestAStopLeavesOneDocument has enough data to reveal a random order.
func TestAStopLeavesOneDocument(t *testing.T) {
	s := newTestStore(t, noSync)
	for n := range 20 {
		p := somebody(n)
		s.must(p.signUp(string(p)+"@example.org"), p.logIn(string(p)+"-1", 2), p.logOut("", int64(-n)), p.logOut("", int64(n)))
		s.must(p.create(ideaID(n), "tea", 1+n%10), p.create(ideaID(n+100), "tea", 1+n%7))
	}
	s.restart()
	first, again := readFiles(t, s.file.path), somebody(1).logOut("", 1)
	s.must(again) // so the next stop writes a new one
	wantError(t, "a stop", s.close(), nil)
	compare(t, "the files after another stop", readFiles(t, s.file.path), first)
	compare(t, "FILE is one document", json.Valid([]byte(s.text())), true)
}

// TestCommitsDuringAStop makes changes while the store stops, and afterwards. Each
// is acknowledged, and is there after a restart, or is rejected.
func TestCommitsDuringAStop(t *testing.T) {
	for _, path := range []string{scratch(t), ""} {
		s := startStore(t, path, noSync)
		var acknowledged sync.Map
		var committing sync.WaitGroup
		for n := range 8 {
			committing.Go(func() {
				err := error(nil)
				for i := 0; err == nil; i++ {
					signUp := somebody(n*10_000 + i).signUp(fmt.Sprint(n, "-", i, "@example.org"))
					if err = s.commit(signUp); err == nil {
						acknowledged.Store(signUp.User.ID, true)
					}
				}
				wantError(t, "a change during a stop", err, errNotSaved)
			})
		}
		for {
			if _, any := s.userByEmail("1-5@example.org"); any {
				break
			}
			runtime.Gosched()
		}
		wantError(t, "a stop", s.close(), nil)
		committing.Wait()
		wantError(t, "a change after it", s.commit(somebody(1).logOut("", 1)), errNotSaved)
		if path == "" {
			continue
		}
		abandon(s)
		s = openTestStore(t, path, noSync)
		acknowledged.Range(func(id, _ any) bool {
			if s.accounts[id.(string)] == nil {
				t.Errorf("the user %s is lost", id)
			}
			return true
		})
	}
}

// TestRivals lets eight sign-ups with one e-mail compete, and then two deletes among
// updates: one of each wins.
func TestRivals(t *testing.T) {
	t.Parallel()
	s, ann := newTestStore(t, noSync), somebody(1)
	s.must(ann.signUp("a@example.org"))
	compete := func(loss error, rivals ...change) {
		t.Helper()
		var winners []change
		errs := make([]error, len(rivals))
		atOnce(len(rivals), func(n int) { errs[n] = s.commit(rivals[n]) })
		for n, err := range errs {
			if err != nil {
				wantError(t, "the loser", err, loss)
			} else if rivals[n].Update == nil {
				winners = append(winners, rivals[n])
			}
		}
		if len(winners) != 1 {
			t.Fatalf("got %d winners, want 1", len(winners))
		}
		s.model.do(winners[0])
		s.survivesAKill("after rivals")
	}
	for n := range 30 {
		email := fmt.Sprintf("someone%d@example.org", n)
		var signUps []change
		for range 4 {
			signUps = append(signUps, person(s.ids.next()).signUp(email), person(s.ids.next()).signUp(strings.ToUpper(email)))
		}
		compete(errEmailTaken, signUps...)

		s.must(ann.create(ideaID(n), "tea", 5))
		update, remove := func() change { return ann.update(ideaID(n), "coffee", 6) }, ann.remove(ideaID(n))
		compete(errNoIdea, update(), remove, update(), update(), remove, update())
		wantError(t, "an update after the delete", s.commit(update()), errNoIdea)
	}
}

// TestManyAtOnceDuringCompactions lets eight people make random changes, each with a
// model, while others read and the store compacts.
func TestManyAtOnceDuringCompactions(t *testing.T) {
	t.Parallel()
	s, models := newTestStore(t, noSync), make([]model, 8)
	for n := range models {
		models[n] = make(model)
		signUp := somebody(n).signUp(fmt.Sprint(n, "@example.org"))
		wantError(t, "a sign-up", s.commit(signUp), models[n].do(signUp))
	}
	atOnce(len(models), func(n int) {
		r, reads := rand.New(rand.NewPCG(uint64(n), 0)), string(somebody((n+1)%len(models)))
		for i := range 1000 {
			c := randomChange(r, models[n], s.ids.next)
			wantError(t, inJSON(c), s.commit(c), models[n].do(c))
			for page := range 3 {
				checkPage(t, s.store, reads, 1+page)
			}
			if i%10 == 0 && i < 900 {
				s.compactNext.Store(true)
			}
		}
	})
	for _, m := range models {
		maps.Copy(s.model, m)
	}
	s.survivesAKill("at the end")
	s.restart()
	s.survivesAKill("after a restart")
}

// checkPage wants a page to be in order and full. It cannot know which ideas are on it.
func checkPage(t *testing.T, s *store, owner string, page int) {
	list, total := s.pageOfIdeas(owner, page)
	var ideas []idea
	err := json.Unmarshal(list, &ideas)
	inOrder := slices.IsSortedFunc(ideas, func(a, b idea) int { return cmp.Compare(b.sum(), a.sum()) })
	if err != nil || len(ideas) != min(pageSize, max(0, total-(page-1)*pageSize)) || !inOrder {
		t.Errorf("page %d of %d ideas has %d, or is out of order (%v)", page, total, len(ideas), err)
	}
}

// TestChangesShareAnFsync starts 64 changes at short intervals. The first must wait
// for those that follow.
func TestChangesShareAnFsync(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	var syncs atomic.Int32
	s := newTestStore(t, func(op, path string, do func() error) error {
		if op == "sync" {
			syncs.Add(1)
		}
		return noSync(op, path, do) // takes no time in which others could join
	})
	s.must(somebody(1).signUp("a@example.org"))
	syncs.Store(0)
	atOnce(64, func(n int) {
		for range n % 4 {
			runtime.Gosched()
		}
		wantError(t, "a create", s.commit(somebody(1).create(ideaID(n), "tea", 5)), nil)
	})
	if n := syncs.Load(); n > 8 {
		t.Errorf("64 changes at once took %d fsyncs, want at most 8", n)
	}
}

// TestWhenToCompact updates an idea until a compaction is due: when there are 1,000
// more changes after the snapshot than things in memory. While a compaction fails, the
// next attempt comes after as many changes again.
func TestWhenToCompact(t *testing.T) {
	compactions, fails := 0, false
	s := newTestStore(t, func(op, path string, do func() error) error {
		if op == "create" {
			if compactions++; fails {
				return errInjected
			}
		}
		return noSync(op, path, do)
	})
	ann := somebody(1)
	update := func(when string, count, want int) {
		t.Helper()
		before := compactions
		s.commitInOneLine(slices.Repeat([]change{ann.update(ideaID(1), "tea", 5)}, count)...)
		compare(t, when+", the compactions", compactions-before, want)
	}
	s.must(ann.signUp("a@example.org"), ann.create(ideaID(1), "tea", 5), ann.logOut("", 1))
	size := 4                          // a user, a session, an idea and a logout
	update("at first", 1000+size-3, 0) // three changes came before
	update("at first", 1, 1)
	update("later", 1000+size, 0)
	update("later", 1, 1)
	update("before a stop", 10, 0)
	s.restart()
	compare(t, "the compactions with those of the first start and of the stop", compactions, 4)
	s.restart()
	compare(t, "the same after a restart without changes", compactions, 4)
	fails = true
	for range 2 {
		update("with a failing disk", 1000+size, 0)
		update("with a failing disk", 1, 1)
	}
	s.survivesAKill("after compactions that failed")
}

// TestBytesOfACreate counts the bytes of the idea of the API document in FILE,
// before and after a clean stop.
func TestBytesOfACreate(t *testing.T) {
	const creates, limit = 1500, 400
	s := newTestStore(t, noSync)
	p := person(s.ids.next())
	s.must(p.signUp("a@example.org"))
	for range creates {
		s.must(p.create(s.ids.next(), "the-content", 8))
	}
	written := len(s.text())
	wantError(t, "a stop", s.close(), nil)
	if each := (written + len(s.text())) / creates; each > limit {
		t.Errorf("got %d bytes for each create, want at most %d", each, limit)
	}
}

// TestABackup copies FILE in steps, as cp does, while 16 people write and the store
// compacts. A copy holds what was acknowledged before, and only what was written.
func TestABackup(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("it renames no open file")
	}
	fake := newFakeDisk(t)
	s := newTestStore(t, fake.step)
	copied := scratch(t)
	in, before, text := openFile(t, s.file.path), "", ""
	var copies []string
	fake.before = func(string) {
		part := make([]byte, 4096)
		n, err := in.Read(part)
		if text += string(part[:n]); err == nil {
			return
		}
		in.Close()
		copies = append(copies, files{dataName: text}.read(t, copied))
		checkHolds(t, "a copy", copies[len(copies)-1], before)
		before, in, text = s.acknowledged(), openFile(t, s.file.path), ""
	}
	s.crowd(16, 50)
	abandon(s.store)
	in.Close()
	for _, state := range copies {
		checkHolds(t, "nobody wrote what a copy holds: the store", contents(s.store), state)
	}
	if len(copies) < 20 {
		t.Errorf("got %d copies, want 20 or more", len(copies))
	}
}

// TestTemporaryFilesAreNew puts other things in the place of FILE.tmp first.
func TestTemporaryFilesAreNew(t *testing.T) {
	for name, create := range map[string]func(victim, path string) error{
		"a file":                func(_, path string) error { return os.WriteFile(path, []byte("an older one"), 0o644) },
		"an empty directory":    func(_, path string) error { return os.Mkdir(path, 0o700) },
		"a link":                os.Symlink,
		"a hard link":           os.Link,
		"a link to nothing":     func(victim, path string) error { return os.Symlink(victim+"2", path) },
		"a link to a directory": func(victim, path string) error { return os.Symlink(filepath.Dir(victim), path) },
	} {
		path, victim := scratch(t), filepath.Join(t.TempDir(), "victim")
		if err := errors.Join(os.WriteFile(victim, []byte("mine"), 0o600), create(victim, path+".tmp")); err != nil {
			t.Logf("%s: %v", name, err) // not everybody may make links on Windows
			continue
		}
		s := openTestStore(t, path, func(op, path string, do func() error) error {
			if op == "create" && filepath.Ext(path) == ".tmp" {
				os.Remove(path)
				create(victim, path) // between the removal at the start, and the compaction
			}
			return do()
		})
		wantError(t, name, s.start(), nil)
		if data := readFile(t, victim); data != "mine" || len(fileNames(t, filepath.Dir(victim))) != 1 {
			t.Errorf("%s: wrote %q through it, among %v", name, data, fileNames(t, filepath.Dir(victim)))
		}
		if made := filesIn(t, filepath.Dir(path)); runtime.GOOS != "windows" && strings.Count(made, " -rw-------\n") != 2 {
			t.Errorf("%s: got the files %s, want FILE and FILE.lock with mode 0600", name, made)
		}
	}
}

// TestChangedBySomebodyElse changes or removes FILE while the store runs. The next
// change must notice, log it once, and lose nothing.
func TestChangedBySomebodyElse(t *testing.T) {
	for name, meddle := range map[string]func(path, older string) error{
		"removed":                     func(path, _ string) error { return os.Remove(path) },
		"moved away":                  func(path, _ string) error { return os.Rename(path, path+".moved") },
		"emptied":                     func(path, _ string) error { return os.Truncate(path, 0) },
		"appended to":                 func(path, _ string) error { return appendTo(path, "\n") },
		"overwritten by an older one": func(path, older string) error { return os.WriteFile(path, []byte(older), 0o600) },
		"replaced by an older one": func(path, older string) error {
			return errors.Join(os.WriteFile(path+".older", []byte(older), 0o600), os.Rename(path+".older", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, log := newTestStore(t, noSync), new(syncBuffer)
			s.logger = slog.New(slog.NewTextHandler(log, nil))
			s.must(somebody(1).signUp("a@example.org"))
			older := s.text()
			s.must(somebody(1).create(ideaID(1), "tea", 5))
			if err := meddle(s.file.path, older); err != nil {
				t.Skip("this system does not allow it:", err)
			}
			s.must(somebody(1).create(ideaID(2), "rain", 6), somebody(1).create(ideaID(3), "snow", 7))
			s.survivesAKill("after another change")
			s.paused(func() {}) // until the log is written
			for strings.Count(log.String(), "\n") == 0 {
				runtime.Gosched()
			}
			if got := log.String(); !strings.Contains(got, "level=WARN") || strings.Count(got, "\n") != 1 {
				t.Errorf("got the log\n%s\nwant one warning", got)
			}
			os.RemoveAll(s.file.path)
			s.restart() // without a change
			s.survivesAKill("after a stop")
		})
	}
}

// TestFileWithAnotherEnd opens files that were edited, or whose last line lacks only
// its line end. Nothing is lost, and FILE is written anew before the next change.
func TestFileWithAnotherEnd(t *testing.T) {
	values, states := example(t)
	snapshot, all := values[0], strings.Join(values, "")
	for name, test := range map[string]struct{ file, want string }{
		"a snapshot without a line end":  {strings.TrimSpace(snapshot), states[0]},
		"a line without a line end":      {strings.TrimSpace(all), states[len(states)-1]},
		"blank lines after a snapshot":   {snapshot + "\n\n", states[0]},
		"blank space after a line":       {all + " \t\r\n\n ", states[len(states)-1]},
		"blank space instead of the end": {strings.TrimSpace(all) + "  ", states[len(states)-1]},
	} {
		path := scratch(t)
		files{dataName: test.file}.write(t, path)
		s := startStore(t, path, noSync)
		compare(t, name, contents(s), test.want)
		compare(t, name+", an incomplete line", s.file.torn, 0)
		wantError(t, name, s.commit(somebody(9).signUp("late@example.org")), nil)
		compare(t, name+", after a change", readFiles(t, path).read(t, scratch(t)), contents(s))
	}
}

// TestHandEdits opens documents in other layouts, without a checksum.
func TestHandEdits(t *testing.T) {
	values, states := example(t)
	plain := checksum.ReplaceAllString(values[0], "")
	var document any
	if err := json.Unmarshal([]byte(plain), &document); err != nil {
		t.Fatal(err)
	}
	sorted := inJSON(document) // keys in another order, and 5.0 turned into 5
	edit := strings.NewReplacer(`"tea","impact":5`, `"tea","impact":8`)
	rescored := strings.Replace(edit.Replace(states[0]), `"average_score":5.0`, `"average_score":6.0`, 1)
	for name, test := range map[string]struct{ file, want string }{
		"no crc32c":         {plain, states[0]},
		"keys sorted":       {sorted, states[0]},
		"sorted, indented":  {indented(t, sorted), states[0]},
		"a score":           {edit.Replace(plain), rescored},
		"a score, indented": {indented(t, edit.Replace(plain)), rescored},
		"a score, and CRLF": {strings.ReplaceAll(edit.Replace(plain), "\n", "\r\n"), rescored},
		"no last id":        {strings.Replace(plain, `"last_id":"user00002",`, "", 1), states[0]},
	} {
		path := scratch(t)
		files{dataName: test.file}.write(t, path)
		s := startStore(t, path, noSync)
		compare(t, name, contents(s), test.want)
		wantError(t, name, s.commit(somebody(9).signUp("late@example.org")), nil)
		compare(t, name+", after a change", readFiles(t, path).read(t, scratch(t)), contents(s))
	}
}

// TestRejectedFiles plays the cases in testdata/rejected.txt, which explains them.
func TestRejectedFiles(t *testing.T) {
	values, _ := example(t)
	document, path := checksum.ReplaceAllString(values[0], ""), scratch(t)
	for text := range strings.SplitSeq(strings.TrimSpace(readFile(t, "testdata/rejected.txt")), "\n\n") {
		lines := strings.Split(text, "\n")
		if strings.HasPrefix(text, "#") {
			continue
		}
		var parts []string
		marks, name, want := "", lines[0], ""
		for _, line := range lines[1:] {
			mark, part, _ := strings.Cut(line, " ")
			if part = strings.ReplaceAll(part, `\n`, "\n"); mark == "!" {
				want = part
				continue
			}
			marks, parts = marks+mark, append(parts, part)
		}
		file := ""
		switch marks[:1] {
		case "=":
			file = parts[0]
		case "~":
			file = withChecksums(parts...)
		case "-":
			if file = strings.Replace(document, parts[0], parts[1], 1); file == document {
				t.Errorf("%s: the document does not have the text %q", name, parts[0])
			}
		}
		files{dataName: file}.rejected(t, path, name, want)
	}
}

// TestRejectedChanges adds changes to FILE, with the right checksum, that only a bug
// could write, and the same changes to a document, by hand.
func TestRejectedChanges(t *testing.T) {
	const inconsistent, invalid = "it is invalid, or contradicts earlier changes", "invalid"
	values, _ := example(t)
	ann, nobody, path := somebody(1), somebody(9), scratch(t)
	var shapes []string
	for _, value := range values {
		shapes = append(shapes, strings.TrimSuffix(checksum.ReplaceAllString(value, ""), "}\n"))
	}
	badUser := func(id, email string) change {
		return change{User: &user{ID: id, Email: email, Name: "Any Name", Password: "hash"}}
	}
	signUpOfOther := change{User: nobody.signUp("new@example.org").User, Session: somebody(8).logIn("key", 1).Session}
	for name, test := range map[string]struct {
		change change
		want   string
	}{
		"an idea without its user":    {nobody.create(ideaID(9), "tea", 5), inconsistent},
		"an idea twice":               {ann.create(ideaID(1), "tea", 5), inconsistent},
		"a user twice":                {badUser(string(ann), "new@example.org"), inconsistent},
		"a user with a short id":      {badUser("u1", "new@example.org"), invalid},
		"a user with no e-mail":       {badUser(string(nobody), ""), invalid},
		"a user with a bad e-mail":    {badUser(string(nobody), "new at example.org"), invalid},
		"a session twice":             {ann.logIn("user00001-0", 10), inconsistent},
		"a session without its user":  {nobody.logIn("key", 10), inconsistent},
		"a sign-up of somebody else":  {signUpOfOther, inconsistent},
		"a logout without its user":   {nobody.logOut("", 1), inconsistent},
		"nothing":                     {change{}, inconsistent},
		"an idea without its content": {change{Create: &storedIdea{Owner: string(ann), Idea: idea{ID: ideaID(9)}}}, invalid},
	} {
		later := withChecksums(append(slices.Clone(shapes), laterLine(test.change))...)
		files{dataName: later}.rejected(t, path, name, fmt.Sprintf("line %d: ", 1+strings.Count(strings.Join(values, ""), "\n")))
		files{dataName: later}.rejected(t, path, name, test.want)
		byHand := strings.TrimSuffix(shapes[0], "\n]") + ",\n" + inJSON(test.change) + "\n]}"
		files{dataName: byHand}.rejected(t, path, name+", by hand", "changes[7]: ")
		files{dataName: byHand}.rejected(t, path, name+", by hand", test.want)
	}
}

// TestInvalidChanges makes changes that no start would accept. They must not reach FILE.
func TestInvalidChanges(t *testing.T) {
	s := newTestStore(t, noSync)
	s.must(somebody(1).signUp("a@example.org"))
	before := s.text()
	bad := storedIdea{Owner: string(somebody(1)), Idea: idea{ID: "zzzzzzzzz", Content: "of the year 2300", Impact: 1, Ease: 1, Confidence: 1}}
	for _, c := range []change{{Create: &bad}, {Update: &bad}, {User: &user{ID: ideaID(1), Email: "x"}}} {
		if err := s.commit(c); err == nil || errors.Is(err, errNotSaved) {
			t.Errorf("%s: got the error %v, want it to be invalid", inJSON(c), err)
		}
	}
	compare(t, "FILE", s.text(), before)
}

// BenchmarkStart reads a FILE with 100,000 ideas.
func BenchmarkStart(b *testing.B) {
	s := newTestStore(b, noSync)
	s.must(somebody(1).signUp("a@example.org"))
	for n := range 100_000 {
		s.commit(somebody(1).create(ideaID(n), "the-content", 8))
	}
	s.close()
	abandon(s.store)
	for b.Loop() {
		again, err := openStore(s.file.path, realDisk, quiet)
		if err != nil {
			b.Fatal(err)
		}
		again.release()
	}
}

// Helpers, which crash_test.go uses, too:

const dataName = "pool.json"
const header = `{"format":2,"last_id":"0","changes":[` + "\n" // begins a FILE, and is followed by changes

var (
	checksum    = regexp.MustCompile(`,"crc32c":"\w+"`)
	errInjected = errors.New("injected")
)

// A person is a user's id. Its methods return changes of this user.
type person string

func somebody(n int) person { return person(fmt.Sprintf("user%05d", n)) }

func ideaID(n int) string { return fmt.Sprintf("idea%05d", n) }

func (p person) signUp(email string) change {
	u := user{ID: string(p), Email: email, Name: "Any Name", Password: "hash"}
	return change{User: &u, Session: p.logIn(string(p)+"-0", 1).Session}
}

func (p person) logIn(key string, second int64) change {
	start := 4_102_444_800 + second // after the year 2100 has begun
	return change{Session: &session{Key: key, UserID: string(p), Start: start, Expires: start + 100}}
}

// logOut ends an access token that expires so many seconds after the year 2100 has begun.
func (p person) logOut(key string, seconds int64) change {
	return change{Logout: &logout{tokenID: tokenID{string(p), 4_102_444_800 + seconds}, Key: key}}
}

func (p person) create(id, content string, impact int) change {
	i := idea{ID: id, Content: content, Impact: impact, Ease: 5, Confidence: 5, Created: 1_600_000_000}
	c := change{Create: &storedIdea{Owner: string(p), Idea: i}}
	c.validate() // makes the average and the JSON
	return c
}

func (p person) update(id, content string, impact int) change {
	return change{Update: p.create(id, content, impact).Create}
}

func (p person) remove(id string) change { return change{Delete: &ideaKey{string(p), id}} }

// randomChange may have to be rejected: its idea may be somebody else's or gone, or
// its e-mail may be taken.
func randomChange(r *rand.Rand, m model, newID func() string) change {
	users := slices.Sorted(maps.Keys(m))
	mine := m[users[r.IntN(len(users))]]
	p, theirs, id, key := person(mine.user.ID), mine, newID(), ""
	if r.IntN(4) == 0 {
		theirs = m[users[r.IntN(len(users))]]
	}
	if n := len(theirs.ideas); n > 0 && r.IntN(20) > 0 {
		id = theirs.ideas[r.IntN(n)].Idea.ID
	}
	if n := len(theirs.sessions); n > 0 {
		key = theirs.sessions[r.IntN(n)].Key
	}
	switch n := r.IntN(100); {
	case n < 5:
		email := fmt.Sprintf("x%d-%s@%s", r.IntN(100), users[0], []string{"example.org", "EXAMPLE.org"}[n%2])
		return person(newID()).signUp(email)
	case n < 20:
		return p.logIn(fmt.Sprint(r.Uint64()), mine.lastLogin+25*r.Int64N(3))
	case n < 30:
		return p.logOut(key, r.Int64N(20))
	case n < 60:
		return p.create(newID(), "<é> & \u2028", 1+r.IntN(10))
	case n < 80:
		return p.update(id, "changed", 1+r.IntN(10))
	}
	return p.remove(id)
}

func inJSON(v any) string {
	text, _ := json.Marshal(v)
	return string(text)
}

// A model holds what was acknowledged, by user id.
type model map[string]*belongings

type belongings struct {
	user      user
	sessions  []session      // oldest first
	ideas     []*storedIdea  // as listed
	loggedOut map[int64]bool // by the second in which the access token expires
	lastLogin int64          // see logIn
}

// do notes a change, or returns why it must be rejected.
func (m model) do(c change) error {
	switch {
	case c.User != nil:
		for _, theirs := range m {
			if strings.EqualFold(theirs.user.Email, c.User.Email) {
				return errEmailTaken
			}
		}
		m[c.User.ID] = &belongings{user: *c.User, sessions: []session{*c.Session}, loggedOut: make(map[int64]bool)}
	case c.Session != nil:
		mine := m[c.Session.UserID]
		mine.lastLogin = c.Session.Start - 4_102_444_800
		mine.sessions = slices.DeleteFunc(mine.sessions, func(s session) bool { return s.Expires <= c.Session.Start })
		mine.sessions = append(mine.sessions[max(0, len(mine.sessions)-99):], *c.Session)
	case c.Logout != nil:
		mine := m[c.Logout.UserID]
		mine.sessions = slices.DeleteFunc(mine.sessions, func(s session) bool { return s.Key == c.Logout.Key })
		mine.loggedOut[c.Logout.Expires] = true
	case c.Create != nil:
		mine := m[c.Create.Owner]
		at, _ := slices.BinarySearchFunc(mine.ideas, c.Create, func(a, b *storedIdea) int {
			return -cmp.Or(cmp.Compare(a.Idea.sum(), b.Idea.sum()), cmp.Compare(a.Idea.ID, b.Idea.ID))
		})
		mine.ideas = slices.Insert(mine.ideas, at, c.Create)
	case c.Update != nil:
		if err := m.do(change{Delete: &ideaKey{c.Update.Owner, c.Update.Idea.ID}}); err != nil {
			return err
		}
		return m.do(change{Create: c.Update})
	case c.Delete != nil:
		mine := m[c.Delete.Owner]
		at := slices.IndexFunc(mine.ideas, func(i *storedIdea) bool { return i.Idea.ID == c.Delete.ID })
		if at < 0 {
			return errNoIdea
		}
		mine.ideas = slices.Delete(mine.ideas, at, at+1)
	}
	return nil
}

// String has a line for each thing.
func (m model) String() string {
	var b strings.Builder
	for _, id := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintln(&b, id, m[id].user)
		for _, s := range m[id].sessions {
			fmt.Fprintln(&b, id, s)
		}
		for _, i := range m[id].ideas {
			fmt.Fprintln(&b, id, string(i.json))
		}
		for _, expires := range slices.Sorted(maps.Keys(m[id].loggedOut)) {
			fmt.Fprintln(&b, id, "logged out", expires)
		}
	}
	return b.String()
}

func modelOf(changes []change) model {
	m := make(model)
	for _, c := range changes {
		m.do(c)
	}
	return m
}

func after(changes ...change) string { return modelOf(changes).String() }

// contents asks the store, at rest, for all that it has.
func contents(s *store) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	m, found := make(model), len(s.emails)+len(s.sessions)+len(s.ideas)+len(s.loggedOut)
	for id, a := range s.accounts {
		mine := &belongings{loggedOut: make(map[int64]bool)}
		m[id] = mine
		if known := s.emails[strings.ToLower(a.user.Email)]; known != nil {
			mine.user = known.user
		}
		for _, theirs := range a.sessions {
			if known := s.sessions[theirs.Key]; known != nil {
				mine.sessions = append(mine.sessions, *known)
			}
		}
		for _, listed := range a.ideas {
			if i, err := s.findIdea(ideaKey{id, listed.Idea.ID}); err == nil && i == listed {
				mine.ideas = append(mine.ideas, i)
			}
		}
	}
	for token := range s.loggedOut {
		m[token.UserID].loggedOut[token.Expires] = true
	}
	text := m.String()
	if n := strings.Count(text, "\n"); n != found {
		text += fmt.Sprintf("the indexes have %d things, not %d\n", found, n)
	}
	return text
}

// A testStore is a store and a model of what it has acknowledged.
type testStore struct {
	*store
	t           testing.TB
	disk        disk
	compactNext atomic.Bool // the next change causes a compaction
	copied      string      // the path of a copy of FILE
	modelMu     sync.Mutex
	model       model
}

func newTestStore(t testing.TB, d disk) *testStore {
	t.Helper()
	s := &testStore{t: t, disk: d, copied: scratch(t), model: make(model)}
	s.store = startStore(t, scratch(t), s.step)
	return s
}

// step is called by the writer before each file operation.
func (s *testStore) step(op, path string, do func() error) error {
	if op == "write" && filepath.Ext(path) != ".tmp" && s.compactNext.Swap(false) {
		s.file.tried = -1 << 30
	}
	return s.disk(op, path, do)
}

// must makes changes, one after the other, and notes them.
func (s *testStore) must(changes ...change) {
	s.t.Helper()
	for _, c := range changes {
		wantError(s.t, inJSON(c), s.commit(c), nil)
		s.modelMu.Lock()
		wantError(s.t, inJSON(c), s.model.do(c), nil)
		s.modelMu.Unlock()
	}
}

// acknowledged returns the contents of the model.
func (s *testStore) acknowledged() string {
	s.modelMu.Lock()
	defer s.modelMu.Unlock()
	return s.model.String()
}

// crowd lets people create ideas, all at the same time, while the store compacts.
func (s *testStore) crowd(people, ideas int) {
	atOnce(people, func(n int) {
		s.must(somebody(n).signUp(fmt.Sprint(n, "@example.org")))
		for range ideas {
			s.compactNext.Store(true)
			s.must(somebody(n).create(s.ids.next(), "tea", 5))
		}
	})
}

// paused stops the writer, calls do, and starts the writer again.
func (s *testStore) paused(do func()) {
	close(s.stopping)
	s.running.Wait()
	do()
	s.stopping = make(chan struct{})
	s.running.Go(s.write)
}

// commitInOneLine makes several changes in one commit.
func (s *testStore) commitInOneLine(changes ...change) {
	s.paused(func() {
		var batch []pendingChange
		for _, c := range changes {
			batch = append(batch, pendingChange{c, make(chan error, 1)})
			s.model.do(c)
		}
		s.commitBatch(batch)
	})
}

// survivesAKill compares what there is, and what a new store makes of FILE, with the model.
func (s *testStore) survivesAKill(when string) {
	s.t.Helper()
	compare(s.t, when, contents(s.store), s.model.String())
	compare(s.t, when+", then a kill", readFiles(s.t, s.file.path).read(s.t, s.copied), s.model.String())
}

func (s *testStore) restart() {
	s.t.Helper()
	wantError(s.t, "a stop", s.close(), nil)
	abandon(s.store)
	s.store = startStore(s.t, s.file.path, s.step)
}

func (s *testStore) text() string { return readFile(s.t, s.file.path) }

// noSync skips the fsync in tests that are not about it.
func noSync(op, _ string, do func() error) error {
	if op == "sync" {
		return nil
	}
	return do()
}

// scratch is the path of a FILE in a directory of its own.
func scratch(t testing.TB) string { return filepath.Join(t.TempDir(), dataName) }

// files are the contents of FILE and FILE.tmp, by name.
type files map[string]string

func readFiles(t testing.TB, path string) files {
	t.Helper()
	f := make(files)
	for _, path := range []string{path, path + ".tmp"} {
		data, err := os.ReadFile(path)
		if err == nil {
			f[filepath.Base(path)] = string(data)
		} else if !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return f
}

// write makes a directory hold these files. Overwriting a file is 25 times as fast as creating one.
func (f files) write(t testing.TB, path string) {
	t.Helper()
	for _, path := range []string{path, path + ".tmp"} {
		data, exists := f[filepath.Base(path)]
		if !exists {
			os.Remove(path)
			continue
		}
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		_, err = file.WriteString(data)
		wantError(t, path, errors.Join(err, file.Truncate(int64(len(data))), file.Close()), nil)
	}
}

// read returns what a store makes of the files, at a path: its contents in lines, or an error.
func (f files) read(t testing.TB, path string) string {
	t.Helper()
	f.write(t, path)
	s, err := openStore(path, realDisk, quiet)
	if err != nil {
		return err.Error()
	}
	defer s.release()
	return contents(s)
}

// rejected wants an error of one line that contains text when a store opens the
// files, and the files as they are.
func (f files) rejected(t *testing.T, path, name, text string) {
	t.Helper()
	if got := f.read(t, path); got == "" || !strings.Contains(got, text) || !strings.Contains(got, "restore a backup") || strings.Contains(got, "\n") {
		t.Errorf("%s: got %q, want an error of one line with %q", name, got, text)
	}
	compare(t, name+", the files", readFiles(t, path), f)
}

// example returns a FILE, value by value, and what there is after the snapshot and after each later line.
func example(t *testing.T) (values, states []string) {
	s := newTestStore(t, noSync)
	ann, bob := somebody(1), somebody(2)
	s.must(ann.signUp("a@example.org"), bob.signUp("b@example.org"))
	s.must(ann.create(ideaID(1), "tea", 5), bob.create(ideaID(2), "rain & wind", 6), ann.logOut("", 0))
	s.restart()
	for _, line := range [][]change{
		{},
		{ann.create(ideaID(3), "scones", 7)},
		{bob.logIn("key", 10), ann.remove(ideaID(3))},
		{bob.update(ideaID(2), "snow", 8), bob.logOut("key", 1)},
		{bob.remove(ideaID(2)), somebody(3).signUp("c@example.org")},
	} {
		if len(line) > 0 {
			s.commitInOneLine(line...)
		}
		states = append(states, contents(s.store))
	}
	return regexp.MustCompile(`(?s).*?"crc32c":"\w{8}"}\n`).FindAllString(s.text(), -1), states
}

// laterLine is a line that follows the snapshot, without its checksum.
func laterLine(c change) string { return `{"changes":[` + inJSON(c) + "]" }

// withChecksums makes a FILE of values, each without its checksum and last brace.
func withChecksums(values ...string) string {
	var file strings.Builder
	sum := uint32(0)
	for _, value := range values {
		sum = crc32.Update(sum, crc32.MakeTable(crc32.Castagnoli), []byte(value))
		fmt.Fprintf(&file, "%s,\"crc32c\":\"%08x\"}\n", value, sum)
	}
	return file.String()
}

func openFile(t testing.TB, path string) *os.File {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// appendTo appends a text to a file.
func appendTo(path, text string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(text)
	return errors.Join(err, file.Close())
}

func indented(t *testing.T, document string) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Indent(&b, []byte(document), "", "\t"); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func readAll(t testing.TB, r io.Reader) string {
	t.Helper()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func fileNames(t testing.TB, directory string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(directory)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
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

// compare shows the first lines that differ when both are printed.
func compare(t testing.TB, name string, got, want any) {
	t.Helper()
	g, w := strings.Split(fmt.Sprint(got), "\n"), strings.Split(fmt.Sprint(want), "\n")
	for len(g) > 1 && len(w) > 1 && g[0] == w[0] {
		g, w = g[1:], w[1:]
	}
	if !slices.Equal(g, w) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, g[0], w[0])
	}
}

func wantError(t testing.TB, name string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got the error %v, want %v", name, got, want)
	}
}

func pages(s *store, owner string) (all []string) {
	for page := 1; ; page++ {
		list, total := s.pageOfIdeas(owner, page)
		var ideas []json.RawMessage
		json.Unmarshal(list, &ideas)
		for _, i := range ideas {
			all = append(all, string(i))
		}
		if page*pageSize >= total {
			return all
		}
	}
}
