package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"maps"
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

// These tests say what the store keeps, what FILE looks like, which files and changes
// the store rejects, and what it does while it is in use. Failures and crashes are in
// crash_test.go.

// TestKeeps makes a change of each kind.
func TestKeeps(t *testing.T) {
	s, ann, bob := startStore(t, scratch(t), noSync), somebody(1), somebody(2)
	mustCommit(t, s, ann.signUp("a@example.org"), bob.signUp("b@example.org"))
	mustCommit(t, s, ann.logIn("key", 5), ann.logOut("key", 60))
	mustCommit(t, s, ann.create(ideaID(1), "tea", 5), ann.create(ideaID(2), "rain", 6), bob.create(ideaID(3), "snow", 7))
	mustCommit(t, s, ann.update(ideaID(1), "coffee", 8), bob.remove(ideaID(3)))
	for _, when := range []string{"at first", "after a restart"} {
		anns, _ := s.pageOfIdeas(string(ann), 1)
		compare(t, when, string(anns), "["+ideaJSON(1, "coffee", 8)+","+ideaJSON(2, "rain", 6)+"]")
		found, _ := s.userByEmail("A@Example.org")
		compare(t, when, found, *ann.signUp("a@example.org").User)
		_, active := s.activeUser(ann.logOut("", 60).Logout.tokenID)
		compare(t, when+", the token is active", active, false)
		compare(t, when, fmt.Sprint(len(s.emails), len(s.sessions), len(s.ideas), len(s.loggedOut)), "2 2 2 1")
		survivesAKill(t, when, s)
		wantError(t, "a stop", s.close(), nil)
		wantOneDocument(t, when, s.file.path)
		abandon(s)
		s = startStore(t, s.file.path, noSync)
	}
	mustCommit(t, s, ann.logOut("", 61))
	abandon(s) // by a kill
	s = startStore(t, s.file.path, noSync)
	wantError(t, "a stop", s.close(), nil)
	wantOneDocument(t, "after a kill, a start and a stop", s.file.path)
}

// TestFormat compares FILE with an example. To write the example anew, run
//
//	go test -run TestFormat -update
func TestFormat(t *testing.T) {
	values, _ := example(t, "tea")
	file := strings.Join(values, "")
	if *update {
		writeFile(t, "testdata/ideapool.json", file)
	}
	compare(t, "FILE (the flag -update writes the example anew)", file, readFile(t, "testdata/ideapool.json"))
	for _, value := range values {
		compare(t, "jq can read "+value, json.Valid([]byte(value)), true)
	}
}

// TestEarlierFiles opens files of the second version of this program: one after a
// kill, and the same one after the next start and stop. After a failure, that version
// wrote a probe of 400 KB.
func TestEarlierFiles(t *testing.T) {
	killed, stopped := readFile(t, "testdata/version2/killed.json"), readFile(t, "testdata/version2/stopped.json")
	probe := `{"changes":[` + inJSON(change{Probe: strings.Repeat("-", 400_000)}) + "]"
	want := reopen(scratch(t), stopped)
	compare(t, "it opens: "+want, strings.Contains(want, "jack@example.org"), true)
	compare(t, "after a kill", reopen(scratch(t), withValue(killed, probe)), want)
}

// TestIDsRiseAndNeverRepeat uses ids of the future, as if the clock had been set back.
func TestIDsRiseAndNeverRepeat(t *testing.T) {
	const earlier, later = "x00000001", "x00000002"
	s, p := startStore(t, scratch(t), noSync), person(earlier)
	check := func(last, file string) {
		t.Helper()
		path := scratch(t)
		writeFile(t, path, file)
		next := openTestStore(t, path, realDisk)
		ids := []string{last, next.ids.next(), next.ids.next(), next.ids.next()}
		if !slices.IsSorted(ids) || len(slices.Compact(ids)) < 4 || !idShape.MatchString(ids[3]) {
			t.Errorf("got the ids %v, want them to rise", ids)
		}
	}
	mustCommit(t, s, p.signUp("a@example.org"))
	check(earlier, text(t, s))
	mustCommit(t, s, p.create(later, "tea", 5), p.remove(later))
	check(later, text(t, s))
	wantError(t, "a stop", s.close(), nil)
	check(later, text(t, s))
	check(later, checksum.ReplaceAllString(text(t, s), "}"))
}

// TestExpiredIsDropped follows a session, and an access token that was logged out. The
// first compaction more than a day after they expired drops them, unless it fails.
func TestExpiredIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fails := false
		s := startStore(t, scratch(t), func(op, path string, do func() error) error {
			if fails {
				return errInjected
			}
			return noSync(op, path, do)
		})
		ann, now := somebody(1), time.Now().Unix()
		token := tokenID{string(ann), now + 600}
		login := session{Key: "short", UserID: string(ann), Start: now, Expires: now + 600}
		mustCommit(t, s, ann.signUp("a@example.org"), change{Session: &login}, change{Logout: &logout{tokenID: token}})
		compact := func(when string, wantErr error, want bool) {
			t.Helper()
			synctest.Wait() // for the writer
			wantError(t, when, s.compact(), wantErr)
			_, active := s.activeUser(token)
			_, _, known := s.session("short")
			compare(t, when+", the session is known", known, want)
			compare(t, when+", the token is active", active, !want)
			survivesAKill(t, when, s)
		}
		compact("at first", nil, true)
		time.Sleep(600*time.Second + 24*time.Hour)
		compact("a day after they expired", nil, true)
		time.Sleep(time.Second)
		fails = true
		compact("more than a day after they expired, on a disk that fails", errInjected, true)
		fails = false
		compact("more than a day after they expired", nil, false)
	})
}

// TestDropWhileOthersRead lets the race detector compare a read with a compaction that
// drops a session. (In synctest, it would see no race.)
func TestDropWhileOthersRead(t *testing.T) {
	s := openTestStore(t, scratch(t), noSync)
	wantError(t, "a start", s.prepareFile(), nil)
	old := session{Key: "old", UserID: string(somebody(1)), Start: 1, Expires: 2}
	commitLine(t, s, somebody(1).signUp("a@example.org"), change{Session: &old})
	atOnce(9, func(n int) {
		if n == 0 {
			wantError(t, "a compaction", s.compact(), nil)
			return
		}
		for range 1000 {
			s.session("old")
		}
	})
}

// Which files the store reads, mends and rejects:

// TestFilesToMend opens files that are not as a server leaves them, but nothing is lost:
// they were edited by hand, in any layout, or end in another way. A start writes them
// anew; it leaves only a file that is intact as it is. If the disk fails, the start
// succeeds all the same: reads work, changes are rejected, and the store heals by itself.
func TestFilesToMend(t *testing.T) {
	values, states := example(t, "tea")
	all, last := strings.Join(values, ""), len(values)-1
	plain := checksum.ReplaceAllString(values[0], "}\n")
	edited := strings.Replace(plain, `"tea","impact":5`, `"tea","impact":8`, 1)
	rescored := strings.Replace(states[0], ideaJSON(1, "tea", 5), ideaJSON(1, "tea", 8), 1)
	for name, test := range map[string]struct{ file, want string }{
		"intact":                         {all, states[last]},
		"a torn line":                    {all[:len(all)-9], states[last-1]},
		"a line without a line end":      {strings.TrimSpace(all), states[last]},
		"blank lines after a snapshot":   {values[0] + "\n\n", states[0]},
		"blank space after a line":       {all + " \t\r\n\n ", states[last]},
		"a blank instead of the end":     {strings.TrimSpace(all) + " ", states[last]},
		"blank space instead of the end": {strings.TrimSpace(all) + "  ", states[last]},
		"no crc32c":                      {plain, states[0]},
		"another layout":                 {strings.NewReplacer("{", "\t{\n", ",", " ,\n ").Replace(plain), states[0]},
		"a score":                        {edited, rescored},
		"a score, and CRLF":              {strings.ReplaceAll(edited, "\n", "\r\n"), rescored},
		"no last id":                     {strings.Replace(plain, `"last_id":"user00002",`, "", 1), states[0]},
	} {
		for _, failing := range []bool{false, true} {
			name := fmt.Sprintf("%s, on a disk that fails: %t", name, failing)
			synctest.Test(t, func(t *testing.T) {
				path := scratch(t)
				writeFile(t, path, test.file)
				writeFile(t, path+".tmp", "of a compaction that did not end")
				s := openTestStore(t, path, func(op, path string, do func() error) error {
					if failing {
						return errInjected
					}
					return noSync(op, path, do)
				})
				wantError(t, name, s.start(), nil)
				compare(t, name, contents(s), test.want)
				compare(t, name+", a line is incomplete", s.file.torn > 0, strings.HasPrefix(name, "a torn line"))
				compare(t, name+", the files", len(glob(t, path+"*")), 2) // the other one is FILE.lock
				asItWas := failing || test.file == all
				compare(t, name+", FILE is as it was", readFile(t, path) == strings.ReplaceAll(test.file, "\r", ""), asItWas)
				late := somebody(9).signUp("late@example.org")
				if failing {
					wantError(t, name+", checkHealth", s.checkHealth(), errNotSaved)
					wantError(t, name+", a change", s.commit(late), errNotSaved)
					compare(t, name+", then", contents(s), test.want)
					time.Sleep(time.Second)
					failing = false
					wantError(t, name+", then checkHealth", s.checkHealth(), nil)
				}
				wantError(t, name, s.commit(late), nil)
				survivesAKill(t, name+", after a change", s)
			})
		}
	}
	s := openTestStore(t, scratch(t), func(string, string, func() error) error { return errInjected })
	wantError(t, "a start without FILE on a disk that fails", s.start(), errInjected)
}

// TestRejectedFiles plays the cases in testdata/rejected.txt, which explains them.
func TestRejectedFiles(t *testing.T) {
	values, _ := example(t, "tea")
	document, path := checksum.ReplaceAllString(values[0], "}\n"), scratch(t)
	for text := range strings.SplitSeq(strings.TrimSpace(readFile(t, "testdata/rejected.txt")), "\n\n") {
		if strings.HasPrefix(text, "#") {
			continue
		}
		name, lines, _ := strings.Cut(text, "\n")
		parts := make(map[string][]string) // by the mark at the begin of the line
		for line := range strings.SplitSeq(lines, "\n") {
			mark, part, _ := strings.Cut(line, " ")
			parts[mark] = append(parts[mark], strings.ReplaceAll(part, `\n`, "\n"))
		}
		file := strings.Join(parts["="], "")
		for _, value := range parts["~"] {
			file = withValue(file, value)
		}
		if old := parts["-"]; old != nil {
			file = strings.Replace(document, old[0], parts["+"][0], 1)
		}
		rejects(t, path, name, file, parts["!"][0])
	}
}

// TestRejectedChanges adds changes to FILE, with the right checksum, that only a bug
// could write, and the same changes to a document, by hand. The store must not write
// those that are invalid by themselves: no start would accept them.
func TestRejectedChanges(t *testing.T) {
	const inconsistent, invalid = "it is invalid, or contradicts earlier changes", "invalid"
	values, _ := example(t, "tea")
	ann, nobody, path, s := somebody(1), somebody(9), scratch(t), startStore(t, scratch(t), noSync)
	file, before := strings.Join(values, ""), text(t, s)
	userOnly := func(p person, email string) change { return change{User: p.signUp(email).User} }
	signUpOfOther := change{User: nobody.signUp("new@example.org").User, Session: somebody(8).logIn("key", 1).Session}
	for name, test := range map[string]struct {
		change change
		want   string
	}{
		"an idea without its user":    {nobody.create(ideaID(9), "tea", 5), inconsistent},
		"an idea twice":               {ann.create(ideaID(1), "tea", 5), inconsistent},
		"an idea without its content": {ann.create(ideaID(9), "", 5), invalid},
		"an idea of the year 2291":    {ann.create("zzzzzzzzz", "tea", 5), invalid},
		"a user twice":                {userOnly(ann, "new@example.org"), inconsistent},
		"a user with a short id":      {userOnly("u1", "new@example.org"), invalid},
		"a user with no e-mail":       {userOnly(nobody, ""), invalid},
		"a user with a bad e-mail":    {userOnly(nobody, "new at example.org"), invalid},
		"a session twice":             {ann.logIn("user00001-0", 10), inconsistent},
		"a session without its user":  {nobody.logIn("key", 10), inconsistent},
		"a sign-up of somebody else":  {signUpOfOther, inconsistent},
		"a logout without its user":   {nobody.logOut("", 1), inconsistent},
		"nothing":                     {change{}, inconsistent},
		"two changes in one":          {change{Logout: ann.logOut("", 1).Logout, Delete: ann.remove(ideaID(1)).Delete}, inconsistent},
	} {
		later := withValue(file, `{"changes":[`+inJSON(test.change)+"]")
		rejects(t, path, name, later, fmt.Sprintf("line %d: ", 1+strings.Count(file, "\n")), test.want)
		byHand := checksum.ReplaceAllString(values[0], "}")
		byHand = strings.Replace(byHand, "\n]}", ",\n"+inJSON(test.change)+"]}", 1)
		rejects(t, path, name+", by hand", byHand, "changes[7]: ", test.want)
		if test.want == invalid {
			if err := s.commit(test.change); err == nil || errors.Is(err, errNotSaved) {
				t.Errorf("%s: got the error %v, want it to be invalid", name, err)
			}
			compare(t, name+", FILE", text(t, s), before)
		}
	}
}

// TestCommitsDuringAStop makes changes while the store stops, and afterwards. Each
// is acknowledged, and is there after a restart, or is rejected.
func TestCommitsDuringAStop(t *testing.T) {
	for _, path := range []string{scratch(t), ""} {
		s, begun := startStore(t, path, noSync), make(chan bool)
		var acknowledged atomic.Int32
		var clients sync.WaitGroup
		for n := range 8 {
			clients.Go(func() {
				err := error(nil)
				for i := 0; err == nil; i++ {
					err = s.commit(somebody(10_000*n + i).signUp(fmt.Sprint(n, "-", i, "@example.org")))
					if err == nil && acknowledged.Add(1) == 40 {
						close(begun)
					}
				}
				wantError(t, "a change during a stop", err, errNotSaved)
			})
		}
		<-begun
		wantError(t, "a stop", s.close(), nil)
		clients.Wait()
		wantError(t, "a change after it", s.commit(somebody(1).logOut("", 1)), errNotSaved)
		compare(t, "the users", len(s.emails), acknowledged.Load())
		if path != "" {
			survivesAKill(t, "after a stop", s)
		}
	}
}

// TestRivals lets eight sign-ups with one e-mail compete, and then two deletes among
// updates: one of each wins.
func TestRivals(t *testing.T) {
	s, ann := startStore(t, scratch(t), noSync), somebody(1)
	mustCommit(t, s, ann.signUp("a@example.org"))
	compete := func(loss error, rivals ...change) {
		t.Helper()
		var winners atomic.Int32
		atOnce(len(rivals), func(n int) {
			if err := s.commit(rivals[n]); err != nil {
				wantError(t, "the loser", err, loss)
			} else if rivals[n].Update == nil {
				winners.Add(1)
			}
		})
		compare(t, "the winners", winners.Load(), 1)
		survivesAKill(t, "after rivals", s)
	}
	for n := range 30 {
		email := fmt.Sprintf("someone%d@example.org", n)
		var signUps []change
		for range 4 {
			signUps = append(signUps, person(s.ids.next()).signUp(email), person(s.ids.next()).signUp(strings.ToUpper(email)))
		}
		compete(errEmailTaken, signUps...)

		mustCommit(t, s, ann.create(ideaID(n), "tea", 5))
		update, remove := func() change { return ann.update(ideaID(n), "coffee", 6) }, ann.remove(ideaID(n))
		compete(errNoIdea, update(), remove, update(), update(), remove, update())
		wantError(t, "an update after the delete", s.commit(update()), errNoIdea)
	}
}

// TestChangesShareAnFsync starts 64 changes at short intervals. The first must wait
// for those that follow.
func TestChangesShareAnFsync(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	syncs := 0
	s := startStore(t, scratch(t), func(op, path string, do func() error) error {
		if op == "sync" {
			syncs++
		}
		return noSync(op, path, do) // takes no time in which others could join
	})
	mustCommit(t, s, somebody(1).signUp("a@example.org"))
	syncs = 0
	atOnce(64, func(n int) {
		for range n % 4 {
			runtime.Gosched()
		}
		wantError(t, "a create", s.commit(somebody(1).create(ideaID(n), "tea", 5)), nil)
	})
	if syncs > 8 {
		t.Errorf("64 changes at once took %d fsyncs, want at most 8", syncs)
	}
}

// TestReadsDuringACompaction stops a compaction half-way. Changes wait, reads do not.
func TestReadsDuringACompaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ann, goOn, saved := startStore(t, scratch(t), noSync), somebody(1), make(chan bool), false
		mustCommit(t, s, ann.signUp("a@example.org"), ann.create(ideaID(1), "tea", 5))
		synctest.Wait()         // for the writer
		s.file.tried = -1 << 30 // a compaction is due after the next change
		s.file.disk = func(op, path string, do func() error) error {
			if op == "create" {
				<-goOn
			}
			return noSync(op, path, do)
		}
		mustCommit(t, s, ann.update(ideaID(1), "coffee", 6))
		go func() {
			mustCommit(t, s, ann.create(ideaID(2), "rain", 5))
			saved = true
		}()
		synctest.Wait()
		compare(t, "a change during a compaction is saved", saved, false)
		if s.mu.TryRLock() {
			s.mu.RUnlock()
			page, _ := s.pageOfIdeas(string(ann), 1)
			compare(t, "a read during a compaction", string(page), "["+ideaJSON(1, "coffee", 6)+"]")
		} else {
			t.Error("a read has to wait for a compaction")
		}
		close(goOn)
		synctest.Wait()
		compare(t, "a change is saved after the compaction", saved, true)
	})
}

// TestABackup copies FILE in steps, as cp does, while 16 people write and read, and the
// store compacts. A copy holds what was acknowledged before, and only what was written.
func TestABackup(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("it renames no open file")
	}
	step := func() {}
	s := startStore(t, scratch(t), func(op, path string, do func() error) error {
		step()
		return noSync(op, path, do)
	})
	holds := func(name, state, part string) {
		for line := range strings.Lines(part) {
			if !strings.Contains(state, line) {
				t.Errorf("%s lacks %s", name, line)
			}
		}
	}
	path, before, text := scratch(t), "", ""
	in, _ := os.Open(s.file.path)
	var copies []string
	step = func() {
		s.file.tried = -1 << 30 // a compaction is always due
		part := make([]byte, 4096)
		n, err := in.Read(part)
		if text += string(part[:n]); err == nil {
			return
		}
		in.Close()
		copies = append(copies, reopen(path, text))
		holds("a copy", copies[len(copies)-1], before)
		before, text = contents(s), "" // of the next copy
		in, _ = os.Open(s.file.path)
	}
	for n := range 16 {
		mustCommit(t, s, somebody(n).signUp(fmt.Sprint(n, "@example.org")))
	}
	atOnce(16, func(n int) {
		for range 50 {
			mustCommit(t, s, somebody(n).create(s.ids.next(), "tea", 5))
			s.pageOfIdeas(string(somebody((n+1)%16)), 1)
		}
	})
	abandon(s)
	for _, state := range copies {
		holds("nobody wrote what a copy holds: the store", contents(s), state)
	}
	if len(copies) < 20 {
		t.Errorf("got %d copies, want 20 or more", len(copies))
	}
}

// TestWhenToCompact updates an idea until a compaction is due: when there are 1,000
// more changes after the snapshot than things in memory. While a compaction fails, the
// next attempt comes after as many changes again.
func TestWhenToCompact(t *testing.T) {
	compactions, fails, ann := 0, false, somebody(1)
	s := openTestStore(t, scratch(t), func(op, path string, do func() error) error {
		if op == "create" {
			compactions++
		} else if fails && filepath.Ext(path) == ".tmp" {
			return errors.Join(do(), errInjected)
		}
		return noSync(op, path, do)
	})
	wantError(t, "a start", s.prepareFile(), nil)
	update := func(when string, count, want int) {
		t.Helper()
		compactions = 0
		commitLine(t, s, slices.Repeat([]change{ann.update(ideaID(1), "tea", 5)}, count)...)
		compare(t, when+", the compactions", compactions, want)
	}
	const size = 4 // a user, a session, an idea and a logout
	commitLine(t, s, ann.signUp("a@example.org"), ann.create(ideaID(1), "tea", 5), ann.logOut("", 1))
	update("after these three changes", 1000+size-3, 0)
	update("after one more", 1, 1)
	fails = true
	for range 2 {
		update("with a failing disk", 1000+size, 0)
		update("with a failing disk, after one more", 1, 1)
	}
	survivesAKill(t, "after compactions that failed", s)
	compare(t, "the files after them", len(glob(t, s.file.path+"*")), 2) // one is FILE.lock
}

// TestACompactionThatFailsLate lets the rename of FILE.tmp fail. FILE, which was closed
// for it, is still there, and GET /healthz tells that it cannot be written.
func TestACompactionThatFailsLate(t *testing.T) {
	s := startStore(t, scratch(t), noSync)
	mustCommit(t, s, somebody(1).signUp("a@example.org"))
	abandon(s)
	s = openTestStore(t, s.file.path, func(op, path string, do func() error) error {
		os.Remove(path + ".tmp") // so that there is nothing to rename
		return noSync(op, path, do)
	})
	s.file.tried = -1 << 30 // a compaction is due after the next change
	commitLine(t, s, somebody(1).create(ideaID(1), "tea", 5))
	compare(t, "changes cannot be saved", s.failing.Load(), true)
	survivesAKill(t, "after a rename that failed", s)
}

// TestBytesOfACreate counts the bytes of an idea in FILE, before and after a stop.
func TestBytesOfACreate(t *testing.T) {
	const creates, limit = 1500, 400
	s, ann := startStore(t, scratch(t), noSync), somebody(1)
	mustCommit(t, s, ann.signUp("a@example.org"))
	for range creates {
		mustCommit(t, s, ann.create(s.ids.next(), "the-content", 8))
	}
	written := len(text(t, s))
	wantError(t, "a stop", s.close(), nil)
	if each := (written + len(text(t, s))) / creates; each > limit {
		t.Errorf("got %d bytes for each create, want at most %d", each, limit)
	}
}

// TestTemporaryFilesAreNew puts other things in the place of FILE.tmp first.
func TestTemporaryFilesAreNew(t *testing.T) {
	for name, create := range map[string]func(victim, path string) error{
		"a file":             func(_, path string) error { return os.WriteFile(path, []byte("an older one"), 0o644) },
		"an empty directory": func(_, path string) error { return os.Mkdir(path, 0o700) },
		"a hard link":        os.Link,
		"a link":             symlink,
		"a link to nothing":  func(victim, path string) error { return symlink(victim+"2", path) },
	} {
		path, victim := scratch(t), filepath.Join(t.TempDir(), "victim")
		writeFile(t, victim, "mine")
		before := filesIn(t, filepath.Dir(victim))
		s := openTestStore(t, path, func(op, path string, do func() error) error {
			if op == "create" {
				create(victim, path) // which not every system allows
			}
			return do()
		})
		wantError(t, name, s.start(), nil)
		compare(t, name+", what it names", filesIn(t, filepath.Dir(victim)), before)
		made := filesIn(t, filepath.Dir(path))
		if runtime.GOOS != "windows" && strings.Count(made, " -rw-------\n") != 2 {
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
		"extended":                    func(path, _ string) error { return os.Truncate(path, 9999) },
		"overwritten by an older one": func(path, older string) error { return os.WriteFile(path, []byte(older), 0o600) },
		"replaced by a copy": func(path, _ string) error {
			return errors.Join(os.WriteFile(path+".copy", []byte(readFile(t, path)), 0o600), os.Rename(path+".copy", path))
		},
		"replaced by an older one": func(path, older string) error {
			return errors.Join(os.WriteFile(path+".older", []byte(older), 0o600), os.Rename(path+".older", path))
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			s, ann := startStore(t, scratch(t), noSync), somebody(1)
			s.logger = slog.New(slog.NewTextHandler(&log, nil))
			mustCommit(t, s, ann.signUp("a@example.org"))
			older := text(t, s)
			mustCommit(t, s, ann.create(ideaID(1), "tea", 5))
			if err := meddle(s.file.path, older); err != nil {
				t.Logf("this system does not allow that it is %s: %v", name, err)
				return
			}
			mustCommit(t, s, ann.create(ideaID(2), "rain", 6))
			survivesAKill(t, name+", after a change", s)
			mustCommit(t, s, ann.create(ideaID(3), "snow", 7))
			survivesAKill(t, name+", after another change", s)
			synctest.Wait() // for the log
			if log := log.String(); !strings.Contains(log, "level=WARN") || strings.Count(log, "\n") != 1 {
				t.Errorf("%s: got the log\n%s\nwant one warning", name, log)
			}
			wantError(t, "a compaction", s.compact(), nil) // so that a stop has no change to write
			os.Remove(s.file.path)
			wantError(t, "a stop", s.close(), nil)
			survivesAKill(t, name+", after a stop", s)
		})
	}
}

// BenchmarkStart reads a FILE with 100,000 ideas.
func BenchmarkStart(b *testing.B) {
	s := startStore(b, scratch(b), noSync)
	mustCommit(b, s, somebody(1).signUp("a@example.org"))
	for n := range 100_000 {
		mustCommit(b, s, somebody(1).create(ideaID(n), "the-content", 8))
	}
	wantError(b, "a stop", s.close(), nil)
	abandon(s)
	for b.Loop() {
		abandon(openTestStore(b, s.file.path, realDisk))
	}
}

// Helpers, which crash_test.go uses, too. First, changes:

// A person is a user's id. Its methods return changes of this user.
type person string

func somebody(n int) person { return person(fmt.Sprintf("user%05d", n)) }

func ideaID(n int) string { return fmt.Sprintf("idea%05d", n) }

const year2100 = 4_102_444_800 // when it begins, in seconds since 1970

func (p person) signUp(email string) change {
	u := user{ID: string(p), Email: email, Name: "Any Name", Password: "hash"}
	return change{User: &u, Session: p.logIn(string(p)+"-0", 1).Session}
}

func (p person) logIn(key string, second int64) change {
	start := year2100 + second
	return change{Session: &session{Key: key, UserID: string(p), Start: start, Expires: start + 100}}
}

func (p person) logOut(key string, second int64) change {
	return change{Logout: &logout{tokenID: tokenID{string(p), year2100 + second}, Key: key}}
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

// ideaJSON returns an idea as a client gets it.
func ideaJSON(n int, content string, impact int) string {
	return string(somebody(1).create(ideaID(n), content, impact).Create.json)
}

func inJSON(v any) string {
	text, _ := json.Marshal(v)
	return string(text)
}

// mustCommit makes changes, one after the other. It may run in any goroutine.
func mustCommit(t testing.TB, s *store, changes ...change) {
	t.Helper()
	for _, c := range changes {
		wantError(t, inJSON(c), s.commit(c), nil)
	}
}

// survivesAKill compares what another store makes of FILE with what the store has.
func survivesAKill(t testing.TB, when string, s *store) {
	t.Helper()
	compare(t, when+", then a kill", reopen(scratch(t), text(t, s)), contents(s))
}

// text returns FILE.
func text(t testing.TB, s *store) string { return readFile(t, s.file.path) }

// contents returns all that a store has, with a line for each thing.
func contents(s *store) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var b strings.Builder
	for _, id := range slices.Sorted(maps.Keys(s.accounts)) {
		a := s.accounts[id]
		fmt.Fprintln(&b, a.user, s.emails[strings.ToLower(a.user.Email)] == a)
		for _, theirs := range a.sessions {
			fmt.Fprintln(&b, *theirs, s.sessions[theirs.Key] == theirs)
		}
		for _, i := range a.ideas {
			fmt.Fprintln(&b, id, string(i.json), s.ideas[i.Idea.ID] == i)
		}
	}
	for _, token := range slices.SortedFunc(maps.Keys(s.loggedOut), compareTokens) {
		fmt.Fprintln(&b, "logged out:", token)
	}
	return b.String()
}

// after returns the contents of a store after some changes.
func after(changes ...change) string {
	s, _ := openStore("", realDisk, quiet)
	for _, c := range changes {
		s.apply(c)
	}
	return contents(s)
}

var errInjected = errors.New("injected")

// checksum is the end of a value of FILE.
var checksum = regexp.MustCompile(`,"crc32c":"\w+"}\n`)

// noSync skips the fsync in tests that are not about it.
func noSync(op, _ string, do func() error) error {
	if op == "sync" {
		return nil
	}
	return do()
}

// scratch returns the path of a FILE in a directory of its own.
func scratch(t testing.TB) string { return filepath.Join(t.TempDir(), "pool.json") }

// reopen returns what a store makes of a FILE with this text: its contents, or an error.
func reopen(path, text string) string {
	err := os.WriteFile(path, []byte(text), 0o600)
	s, openErr := openStore(path, realDisk, quiet)
	if err := errors.Join(err, openErr); err != nil {
		return err.Error()
	}
	defer s.release()
	return contents(s)
}

// wantOneDocument looks at what a stop has left.
func wantOneDocument(t *testing.T, when, path string) {
	t.Helper()
	left := glob(t, path+"*") // one is FILE.lock
	if !json.Valid([]byte(readFile(t, path))) || len(left) != 2 {
		t.Errorf("%s: got the files %q, want one JSON document in FILE", when, left)
	}
}

// rejects wants an error of one line, with some texts in it, when a store opens FILE,
// and FILE as it was.
func rejects(t *testing.T, path, name, text string, wants ...string) {
	t.Helper()
	got := reopen(path, text)
	for _, want := range append(wants, "restore a backup") {
		if !strings.Contains(got, want) || strings.Contains(got, "\n") {
			t.Errorf("%s: got %q, want an error of one line with %q", name, got, want)
		}
	}
	compare(t, name+", FILE", readFile(t, path) == strings.ReplaceAll(text, "\r", ""), true)
}

// example returns a FILE, value by value, and the contents of the store after each of
// them: the snapshot, and lines with one change or two.
func example(t testing.TB, content string) (values, states []string) {
	t.Helper()
	path, ann, bob := scratch(t), somebody(1), somebody(2)
	s := openTestStore(t, path, noSync)
	wantError(t, "a start", s.prepareFile(), nil)
	var done []change
	for n, line := range [][]change{
		{
			ann.signUp("a@example.org"), bob.signUp("b@example.org"), ann.logOut("", 0),
			ann.create(ideaID(1), content, 5), bob.create(ideaID(2), "rain & wind", 6),
		},
		{ann.create(ideaID(3), "scones", 7)},
		{bob.logIn("key", 10), ann.remove(ideaID(3))},
		{bob.update(ideaID(2), "snow", 8), bob.logOut("key", 1)},
		{bob.remove(ideaID(2)), somebody(3).signUp("c@example.org")},
	} {
		commitLine(t, s, line...)
		if n == 0 {
			wantError(t, "a compaction", s.compact(), nil)
		}
		done = append(done, line...)
		states = append(states, after(done...))
	}
	compare(t, "the example", contents(s), after(done...))
	values = strings.SplitAfter(readFile(t, path), "\"}\n")
	return values[:len(values)-1], states
}

// commitLine commits changes in one line of FILE. The writer must not be running.
func commitLine(t testing.TB, s *store, changes ...change) {
	t.Helper()
	var batch []pendingChange
	for _, c := range changes {
		batch = append(batch, pendingChange{c, make(chan error, 1)})
	}
	s.commitBatch(batch)
	for _, p := range batch {
		wantError(t, inJSON(p.change), <-p.result, nil)
	}
}

// withValue adds a value, which lacks its checksum and last brace, to a FILE.
func withValue(file, value string) string {
	sum := crc32.Checksum([]byte(checksum.ReplaceAllString(file, "")+value), castagnoli)
	return fmt.Sprintf("%s%s,\"crc32c\":\"%08x\"}\n", file, value, sum)
}

// compare compares two values as they are printed.
func compare(t testing.TB, name string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		t.Errorf("%s: got\n%s\nwant\n%s", name, g, w)
	}
}

func wantError(t testing.TB, name string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got the error %v, want %v", name, got, want)
	}
}
