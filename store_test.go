package main

import (
	"bufio"
	"cmp"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// These tests hold the store to the promise at the top of store.go. They keep a plain model of what was acknowledged;
// whatever happens, the contents of the store must be the same text. And they let everything fail that can: FILE is
// damaged, the power is lost, an operation on the disk fails (see the type disk), and the server is killed.

var long = flag.Bool("long", false, "kill the server many times, which takes minutes")
var update = flag.Bool("update", false, "write testdata/ideapool.json anew")

// TestFormat compares FILE with an example, which is a sequence of JSON values, as jq reads.
func TestFormat(t *testing.T) {
	values, _ := example(t)
	if *update {
		writeFile(t, "testdata/ideapool.json", []byte(strings.Join(values, "")))
	}
	compare(t, "FILE (the flag -update writes the example anew)", strings.Join(values, ""), readText("testdata/ideapool.json"))
	for _, value := range values {
		wantError(t, "JSON", json.Unmarshal([]byte(value), new(any)), nil)
	}
}

// TestIDsRiseAndNeverRepeat asks for ids in the year 2000, where the clock of synctest begins.
func TestIDsRiseAndNeverRepeat(t *testing.T) {
	s := newTestStore(t, noSync)
	check := func(last string, left files) {
		synctest.Test(t, func(t *testing.T) {
			path := scratch(t)
			left.write(t, path)
			s := mustOpen(t, path, nil)
			ids := []string{last, s.newID(), s.newID(), s.newID()}
			if !slices.IsSorted(ids) || len(slices.Compact(ids)) < 4 || !idShape.MatchString(ids[3]) {
				t.Errorf("got the ids %v, want them to rise", ids)
			}
		})
	}
	p, gone := person(s.newID()), s.newID()
	s.must(p.signUp("a@example.org"))
	check(string(p), readFiles(t, s.path))
	s.must(p.create(gone, "tea", 5), p.remove(gone))
	for range 3 {
		check(gone, readFiles(t, s.path))
		s.restart()
	}
	check(gone, files{dataName: checksum.ReplaceAllString(s.file(), "")})
}

// TestLogoutsLast follows an access token that was logged out, until more than a day after it expired.
func TestLogoutsLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ann := newTestStore(t, noSync), somebody(1)
		token := tokenID{string(ann), time.Now().Unix() + 600}
		s.must(ann.signUp("a@example.org"), change{Logout: &logout{tokenID: token}})
		check := func(when string, lasts bool) {
			t.Helper()
			s.must(ann.create(ideaID(1), "tea", 5), ann.remove(ideaID(1))) // so that the stop compacts
			s.restart()
			_, active := s.activeUser(token)
			if inFile := strings.Contains(s.file(), "logout"); active == lasts || inFile != lasts {
				t.Errorf("%s: got an active token: %t, a logout in FILE: %t", when, active, inFile)
			}
			s.survivesAKill(when)
		}
		check("at first", true)
		time.Sleep(600*time.Second + 24*time.Hour)
		check("a day after it expired", true)
		time.Sleep(time.Second)
		clear(s.model[string(ann)].loggedOut)
		check("more than a day after it expired", false)
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
	first, again := readFiles(t, s.path), somebody(1).logOut("", 1)
	s.must(again) // so the next stop writes a new one
	wantError(t, "a stop", s.close(), nil)
	wantError(t, "a change after it", s.commit(again), errNotSaved)
	compare(t, "the files after another stop", readFiles(t, s.path), first)
	compare(t, "FILE is one document", json.Valid([]byte(s.file())), true)
}

// TestABackup copies FILE in steps, as cp does, while 16 people write and the store compacts. A copy holds what was
// acknowledged before, and only what was written.
func TestABackup(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("it renames no open file")
	}
	fake := newFakeDisk()
	s := newTestStore(t, fake.step)
	before, in, text, copies := "", must(os.Open(s.path)), "", []string(nil)
	fake.before = func(string) {
		part := make([]byte, 4096)
		n, err := in.Read(part)
		if text += string(part[:n]); err == nil {
			return
		}
		in.Close()
		copies = append(copies, files{dataName: text}.read(t, s.scratch))
		checkHolds(t, "a copy", copies[len(copies)-1], before)
		before, in, text = s.acknowledged(), must(os.Open(s.path)), ""
	}
	s.crowd(16, 50)
	abandon(s.store)
	in.Close()
	for _, state := range copies {
		checkHolds(t, "nobody wrote what a copy holds: the store", contents(s.store), state)
	}
	compare(t, "there are 20 copies or more", len(copies) >= 20, true)
}

// TestACrashUnderManyClients checks before each file operation what each kind of crash leaves, while eight people write.
func TestACrashUnderManyClients(t *testing.T) {
	fake := newFakeDisk()
	s := newTestStore(t, fake.step)
	fake.before = func(op string) {
		for _, kind := range crashes {
			checkHolds(t, "before "+op+", "+kind, fake.after(kind).left().read(t, s.scratch), s.acknowledged())
		}
	}
	s.crowd(8, 5)
}

// crowd lets people create ideas, all at the same time, while the store compacts.
func (s *testStore) crowd(people, ideas int) {
	atOnce(people, func(n int) {
		s.must(somebody(n).signUp(fmt.Sprint(n, "@example.org")))
		for range ideas {
			s.compactSoon()
			s.must(somebody(n).create(s.newID(), "tea", 5))
		}
	})
}

func checkHolds(t *testing.T, name, state, part string) {
	t.Helper()
	for line := range strings.Lines(part) {
		if !strings.Contains(state, line) {
			t.Errorf("%s lacks %s", name, line)
		}
	}
}

// TestMemoryOfALogout allows 60 bytes for each access token: no copy of the user id.
func TestMemoryOfALogout(t *testing.T) {
	const logouts, limit = 100_000, 60
	heap := func() int {
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return int(stats.HeapAlloc)
	}
	m, before := newMemory(), heap()
	wantError(t, "a sign-up", m.apply(somebody(1).signUp("a@example.org")), nil)
	for n := range logouts {
		wantError(t, "a logout", m.apply(somebody(1).logOut("", int64(n))), nil)
	}
	if each := (heap() - before) / logouts; each > limit {
		t.Errorf("got %d bytes of memory for each logout, want at most %d", each, limit)
	}
	runtime.KeepAlive(m)
}

// TestLockErrors blames another process only if there is one.
func TestLockErrors(t *testing.T) {
	for _, err := range []error{syscall.ENOSYS, syscall.ENOLCK, syscall.ENOTSUP, syscall.EWOULDBLOCK} {
		got, locked := lockError(err), err == syscall.EWOULDBLOCK
		if errors.Is(got, errLocked) != locked || errors.Is(got, err) == locked {
			t.Errorf("%v: got the error %v", err, got)
		}
	}
}

// TestTemporaryFilesAreNew puts other things in the place of FILE.tmp first.
func TestTemporaryFilesAreNew(t *testing.T) {
	for name, create := range map[string]func(victim, path string) error{
		"a file":                func(_, path string) error { return os.WriteFile(path, []byte("an older one"), 0o644) },
		"an empty directory":    func(_, path string) error { return os.Mkdir(path, 0o700) },
		"a link":                os.Symlink,
		"a hard link":           os.Link,
		"a link to nothing":     func(victim, path string) error { return symlink(victim+"2", path) },
		"a link to a directory": func(victim, path string) error { return symlink(filepath.Dir(victim), path) },
	} {
		path, victim := scratch(t), filepath.Join(t.TempDir(), "victim")
		if err := errors.Join(os.WriteFile(victim, []byte("mine"), 0o600), create(victim, path+".tmp")); err != nil {
			t.Logf("%s: %v", name, err) // not everybody may make links on Windows
			continue
		}
		mustStart(t, path, nil)
		names := must(os.ReadDir(filepath.Dir(victim)))
		if data := must(os.ReadFile(victim)); string(data) != "mine" || len(names) != 1 {
			t.Errorf("%s: wrote %q through it, among %v", name, data, names)
		}
		if made := filesIn(filepath.Dir(path)); runtime.GOOS != "windows" && strings.Count(made, " -rw-------\n") != 2 {
			t.Errorf("%s: got the files %s, want FILE and FILE.lock with mode 0600", name, made)
		}
	}
}

// TestRivals lets eight sign-ups with one e-mail compete, and then two deletes among updates: one of each wins.
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
		compare(t, "the number of winners", len(winners), 1)
		s.model.do(winners[0])
		s.survivesAKill("after rivals")
	}
	for n := range 30 {
		email := fmt.Sprintf("someone%d@example.org", n)
		var signUps []change
		for range 4 {
			signUps = append(signUps, person(s.newID()).signUp(email), person(s.newID()).signUp(strings.ToUpper(email)))
		}
		compete(errEmailTaken, signUps...)

		s.must(ann.create(ideaID(n), "tea", 5))
		update, remove := func() change { return ann.update(ideaID(n), "coffee", 6) }, ann.remove(ideaID(n))
		compete(errNoIdea, update(), remove, update(), update(), remove, update())
		wantError(t, "an update after the delete", s.commit(update()), errNoIdea)
	}
}

// TestManyAtOnceDuringCompactions lets eight people make random changes, each with a model, while others read and the
// store compacts.
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
			c := randomChange(r, models[n], s.newID)
			wantError(t, inJSON(c), s.commit(c), models[n].do(c))
			for page := range 3 {
				checkPage(t, s.store, reads, 1+page)
			}
			if i%10 == 0 && i < 900 {
				s.compactSoon()
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
	inOrder := slices.IsSortedFunc(ideas, func(a, b idea) int { return -cmp.Compare(a.Average, b.Average) })
	if err != nil || len(ideas) != min(pageSize, max(0, total-(page-1)*pageSize)) || !inOrder {
		t.Errorf("page %d of %d ideas has %d, or is out of order (%v)", page, total, len(ideas), err)
	}
}

// TestChangesShareAnFsync starts 64 changes at short intervals. The first must wait for those that follow.
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
	if n := syncs.Load(); n > 3 {
		t.Errorf("64 changes at once took %d fsyncs", n)
	}
}

// Recovery: what was never acknowledged is dropped. Other damage is rejected, and no file is changed.

// TestFileCutAnywhere opens every prefix of FILE. Each holds its whole commits, and no part of the next.
func TestFileCutAnywhere(t *testing.T) {
	t.Parallel()
	values, states := example(t)
	file, inSnapshot := strings.Join(values, ""), strings.Count(values[0], "\n")
	path, next, snapshot := scratch(t), scratch(t), len(values[0])-1 // without its newline
	for cut := range len(file) + 1 {
		name, prefix := fmt.Sprintf("cut at byte %d", cut), files{dataName: file[:cut]}
		if cut < snapshot {
			prefix.rejected(t, path, name, "")
			continue
		}
		lines, torn := max(strings.Count(file[:cut], "\n"), inSnapshot), 0
		if cut > snapshot && file[cut-1] != '\n' {
			torn = lines + 1
		}
		prefix.write(t, path)
		s := mustOpen(t, path, noSync)
		compare(t, name+", the incomplete line", s.torn, torn)
		compare(t, name, contents(s), states[lines-inSnapshot])
		if cut%5 == snapshot%5 { // a start is slow
			wantError(t, name, s.start(), nil)
			started := readFiles(t, path)
			if !json.Valid([]byte(started[dataName])) {
				t.Errorf("%s: a start leaves %q", name, started)
			}
			compare(t, name+", after a start", started.read(t, next), states[lines-inSnapshot])
			wantError(t, name, s.commit(somebody(9).signUp("late@example.org")), nil)
			compare(t, name+", after a change", readFiles(t, path).read(t, next), contents(s))
		}
		abandon(s)
	}
}

// TestAFlippedBitIsRejected flips every bit of FILE, except in the last newline: without that a line is torn.
func TestAFlippedBitIsRejected(t *testing.T) {
	t.Parallel()
	values, _ := example(t)
	file, path := strings.Join(values, ""), scratch(t)
	for at := range len(file) - 1 {
		place := "" // in the snapshot, the error may name a later line
		if at >= len(values[0]) {
			place = fmt.Sprintf("line %d: ", 1+strings.Count(file[:at], "\n"))
		}
		for bit := range 8 {
			flipped := []byte(file)
			flipped[at] ^= 1 << bit
			files{dataName: string(flipped)}.rejected(t, path, fmt.Sprintf("bit %d of byte %d flipped", bit, at), place)
		}
	}
}

// TestALostBlock puts zeros where a block was lost. In the last line that is no damage: it was not fsynced.
func TestALostBlock(t *testing.T) {
	values, states := example(t)
	last, path := len(values)-1, scratch(t)
	for at, value := range values {
		n := len(value)
		for _, lost := range [][2]int{{0, 1}, {0, n / 2}, {n / 3, n / 2}, {n - 3, n - 1}, {0, n}, {n / 2, n}, {n - 1, n}} {
			damaged := slices.Clone(values)
			damaged[at] = value[:lost[0]] + strings.Repeat("\x00", lost[1]-lost[0]) + value[lost[1]:]
			f := files{dataName: strings.Join(damaged, "")}
			name := fmt.Sprintf("value %d of %d without the bytes %d", at+1, len(values), lost)
			if at == last {
				compare(t, name, f.read(t, path), states[last-1])
			} else if at < last-1 || lost[1] < n { // else it has lost its newline, and is the last line
				f.rejected(t, path, name, "")
			}
		}
	}
}

// TestLinesOutOfPlace puts whole lines where they do not belong.
func TestLinesOutOfPlace(t *testing.T) {
	values, states := example(t)
	foreign, _ := example(t, somebody(4).signUp("d@example.org"))
	path, last := scratch(t), len(values)-1
	// check replaces values, so that there is a fault after the first good ones.
	check := func(name string, from, to, good int, others ...string) {
		t.Helper()
		changed := slices.Replace(slices.Clone(values), from, to, others...)
		place := fmt.Sprintf("line %d: ", strings.Count(strings.Join(values[:good], ""), "\n")+1)
		files{dataName: strings.Join(changed, "")}.rejected(t, path, name, place)
	}
	for n := 1; n <= last; n++ {
		check("a line twice", n, n, n+1, values[n])
		check("an empty line", n, n, n, "\n")
		check("a line of another file", n, n+1, n, foreign[n])
		check("the snapshot again", n, n, n, values[0])
		compare(t, "without the last lines", files{dataName: strings.Join(values[:n], "")}.read(t, path), states[n-1])
		if n < last {
			check("a line missing", n, n+1, n)
			check("lines swapped", n, n+2, n, values[n+1], values[n])
			check("a line moved to the end", n, last+1, n, append(slices.Clone(values[n+1:]), values[n])...)
		}
	}
	files{dataName: foreign[0] + values[1]}.rejected(t, path, "the snapshot of another file", errDamaged.Error())
	for line := range strings.Lines(values[0]) {
		files{dataName: strings.Replace(values[0], line, "", 1) + values[1]}.rejected(t, path, "without "+line, "")
		files{dataName: strings.Replace(values[0], line, line+line, 1)}.rejected(t, path, "twice "+line, "")
	}
}

// TestRejectedFiles plays the cases of testdata/rejected.txt, which explains their form.
func TestRejectedFiles(t *testing.T) {
	values, _ := example(t)
	for n, value := range values {
		values[n] = strings.TrimSuffix(checksum.ReplaceAllString(value, ""), "}\n")
	}
	path, place := scratch(t), fmt.Sprintf("line %d: ", strings.Count(strings.Join(values, "\n"), "\n")+2)
	for _, text := range strings.Split(readText("testdata/rejected.txt"), "\n\n")[1:] {
		lines := strings.Split(strings.TrimSpace(text), "\n")
		parts := make(map[string][]string) // by the first character of a line
		for _, line := range lines[1:] {
			part := strings.ReplaceAll(strings.TrimPrefix(line[1:], " "), `\n`, "\n")
			parts[line[:1]] = append(parts[line[:1]], part)
		}
		rejected := func(file, text string) { files{dataName: file}.rejected(t, path, lines[0], text) }
		switch err := parts["!"][0]; {
		case parts["="] != nil:
			rejected(parts["="][0], err)
		case parts["~"] != nil:
			rejected(withChecksums(parts["~"]...), err)
		case parts["-"] != nil:
			checkHolds(t, lines[0]+": the example", values[0], parts["-"][0])
			rejected(strings.Replace(values[0], parts["-"][0], parts["+"][0], 1)+"}", err)
		case parts["&"] != nil:
			added := withChecksums(append(values, `{"changes":[`+parts["&"][0]+"]")...)
			rejected(added, place)
			rejected(added, err)
			rejected(strings.TrimSuffix(values[0], "]")+","+parts["&"][0]+"]}", err)
		}
	}
}

// TestHandEdits edits the first document of an example.
func TestHandEdits(t *testing.T) {
	values, states := example(t)
	plain := checksum.ReplaceAllString(values[0], "")
	indented := func(text string) string { return string(must(json.MarshalIndent(json.RawMessage(text), "", "  "))) }
	var doc any
	json.Unmarshal([]byte(plain), &doc)
	sorted := string(must(json.Marshal(doc))) // keys in another order, and 5.0 turned into 5
	edit := strings.NewReplacer(`"tea","impact":5`, `"tea","impact":8`)
	rescored := strings.Replace(edit.Replace(states[0]), `"average_score":5.0`, `"average_score":6.0`, 1)
	for name, test := range map[string]struct{ file, want string }{
		"no crc32c":         {plain, states[0]},
		"no last newline":   {strings.TrimSpace(plain), states[0]},
		"keys sorted":       {sorted, states[0]},
		"sorted, indented":  {indented(sorted), states[0]},
		"a score":           {edit.Replace(plain), rescored},
		"a score, indented": {indented(edit.Replace(plain)), rescored},
		"a score, and CRLF": {strings.ReplaceAll(edit.Replace(plain), "\n", "\r\n"), rescored},
		"no last id":        {strings.Replace(plain, `"last_id":"user00002",`, "", 1), states[0]},
	} {
		path := scratch(t)
		files{dataName: test.file}.write(t, path)
		s := mustStart(t, path, noSync)
		compare(t, name, contents(s), test.want)
		wantError(t, name, s.commit(somebody(9).signUp("late@example.org")), nil)
		compare(t, name+", after a change", readFiles(t, path).read(t, scratch(t)), contents(s))
	}
}

// TestAnyOrder reads files of one user with many ideas, in a good order and a bad one.
func TestAnyOrder(t *testing.T) {
	t.Parallel()
	ann := somebody(1)
	changes := []change{ann.signUp("a@example.org")}
	for n := range 10_000 {
		changes = append(changes, ann.create(ideaID(n), "tea", 1+n%10))
	}
	want := after(changes...)
	for _, order := range []string{"as created", "shuffled"} {
		var texts, lines []string
		for _, c := range changes {
			texts, lines = append(texts, inJSON(c)), append(lines, laterLine(c))
		}
		snapshot := header + strings.Join(texts, ",\n") + "\n]"
		lines[0] = header + texts[0] + "\n]"
		for _, file := range []string{withChecksums(snapshot), withChecksums(lines...), snapshot + "}"} {
			compare(t, order, files{dataName: file}.read(t, scratch(t)), want)
		}
		rand.Shuffle(len(changes)-1, func(a, b int) { changes[a+1], changes[b+1] = changes[b+1], changes[a+1] })
	}
}

// TestWhenToCompact makes logouts until FILE has more changes than store.write allows. Those in a snapshot do not count.
func TestWhenToCompact(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		compactions, logouts, fails := 0, 0, false
		s := newTestStore(t, func(op, path string, do func() error) error {
			if op == "create" {
				if compactions++; fails {
					return errInjected
				}
			}
			return noSync(op, path, do)
		})
		logOut := func(when string, count, want int) {
			t.Helper()
			before, line := compactions, make([]change, count)
			for n := range line {
				logouts++
				line[n] = somebody(1).logOut("", int64(logouts))
			}
			s.commitInOneLine(line...)
			time.Sleep(time.Second) // there is at most one compaction a second
			synctest.Wait()
			compare(t, when+", the compactions", compactions-before, want)
		}
		s.must(somebody(1).signUp("a@example.org"))
		const most = 1000 + 2*2       // a snapshot has two changes: a user and a session
		logOut("at first", most-1, 0) // after a line with one change, the sign-up
		logOut("at first", 1, 1)
		for n := range 2 {
			logOut("later", most-2, 0) // after a snapshot
			logOut("later", 1, 1)
			s.restart()
			compare(t, "the compactions, none by a restart without changes", compactions, 3+n)
		}
		fails = true
		logOut("with a failing disk", most-2, 0)
		before := compactions
		for second := range 125 {
			s.must(somebody(1).logOut("", int64(-second)))
			time.Sleep(time.Second)
		}
		compare(t, "the compactions that fail in 125 seconds", compactions-before, 3)
		s.survivesAKill("after compactions that failed")
	})
}

// TestBytesOfACreate counts the bytes of the idea of the API document in FILE, before and after a clean stop.
func TestBytesOfACreate(t *testing.T) {
	const creates, limit = 1500, 400
	s := newTestStore(t, noSync)
	p := person(s.newID())
	s.must(p.signUp("a@example.org"))
	for range creates {
		s.must(p.create(s.newID(), "the-content", 8))
	}
	written := len(s.file())
	compare(t, "the lines of FILE, without a compaction", strings.Count(s.file(), "\n"), 3+creates)
	wantError(t, "a stop", s.close(), nil)
	if each := (written + len(s.file())) / creates; each > limit {
		t.Errorf("got %d bytes for each create, want at most %d", each, limit)
	}
}

// Crashes and failures:

// crashes are those that the tests look at. A kill loses nothing. A power loss may lose all that was not fsynced, or some
// of it: POSIX does not say in what order bytes and names reach the disk.
var crashes = []string{"a kill", "a power loss", "a loss of bytes", "a loss of half the bytes", "a lost block"}

// TestACrashLosesNothing checks before every file operation what each kind of crash leaves: what was acknowledged, and
// and the change under way as a whole or not at all, while nobody sees it yet. The next start may crash, too. On some file
// systems, such as CIFS, the fsync of a directory returns an error.
func TestACrashLosesNothing(t *testing.T) {
	t.Parallel()
	var done []change
	for seed, errno := range []error{nil, syscall.EINVAL, syscall.ENOTSUP} {
		synctest.Test(t, func(t *testing.T) {
			p, ops := newPlayer(t, seed), 0
			p.fake.inject = func(op, path string, do func() error) error {
				if op == "sync" && filepath.Ext(path) == "" {
					return cmp.Or(do(), errno)
				}
				return do()
			}
			p.fake.before = func(op string) {
				when := fmt.Sprintf("before operation %d, %s", ops, op)
				compare(t, when, contents(p.store), after(p.done...))
				p.lookAt(when, p.fake, 1, after(p.done...), after(p.next...))
				ops++
			}
			p.play("")
			p.fake.before("the end")
			compare(t, "the changes during compactions", p.interruptions, 9)
			done = append(done, p.done...)
		})
	}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[change]()) {
		has := func(c change) bool { return !reflect.ValueOf(c).FieldByIndex(field.Index).IsZero() }
		if field.IsExported() && field.Name != "Probe" && !slices.ContainsFunc(done, has) {
			t.Errorf("there was no %s; randomChange must make every kind of change", field.Name)
		}
	}
}

// TestAFailureAtAnyOperation lets each operation fail, with no effect, half of it, or all of it. A change is then
// rejected and never seen, nothing else is lost, and the store heals by itself.
func TestAFailureAtAnyOperation(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	for n := 0; playWithFailures(t, seen, n, n); n++ {
	}
	for _, first := range []int{7, 8, 20} { // a write and an fsync of a commit, and a write of a compaction
		for n := range 8 { // and one of the operations that follow
			playWithFailures(t, seen, first, first+1+n)
		}
	}
}

// playWithFailures returns false if there is no such operation.
func playWithFailures(t *testing.T, seen map[string]bool, first, second int) bool {
	count := 0
	for _, effect := range []string{"no effect", "half its effect", "its whole effect"} {
		synctest.Test(t, func(t *testing.T) {
			count = 0
			p := newPlayer(t, second) // each time with other changes
			p.seen = seen
			p.fake.inject = func(op, path string, do func() error) error {
				if count++; count-1 != first && count-1 != second {
					return do()
				}
				isKept := op == "rename" && effect == "no effect" && runtime.GOOS != "windows" // where FILE is closed by then
				p.failed = p.failed || filepath.Ext(path) != ".tmp" && !isKept
				switch {
				case effect == "half its effect" && op == "write":
					return halfWrite(path, do)
				case effect == "its whole effect" && (op != "create" || runtime.GOOS != "windows"): // which removes no open file
					do()
				}
				return errInjected
			}
			p.play(fmt.Sprintf("operations %d and %d fail with %s", first, second, effect))
		})
	}
	return count > second
}

// A player makes random changes in three runs of the server, on a fake disk.
type player struct {
	*store
	t     *testing.T
	fake  *fakeDisk
	paths []string
	seen  map[string]bool // crashes that were looked at: many leave the same

	random        *rand.Rand
	left          int      // changes to be made in this run
	ids           int      // used so far
	done          []change // what was acknowledged
	next          []change // done, and the change under way
	interruptions int      // changes made during a compaction
	failed        bool     // an operation on FILE has failed
}

func newPlayer(t *testing.T, seed int) *player {
	paths := []string{scratch(t), scratch(t), scratch(t)}
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	return &player{t: t, fake: newFakeDisk(), paths: paths, seen: make(map[string]bool), random: random}
}

func (p *player) play(name string) {
	path := p.paths[2]
	for run := range 3 {
		p.store = mustOpen(p.t, path, p.step)
		if p.start() != nil {
			abandon(p.store) // the process ends, and somebody starts another
			p.look(name + ", in a start")
			if run == 0 {
				compare(p.t, name+": the files after the first start", readFiles(p.t, path), files{})
			}
			p.store = mustStart(p.t, path, p.step)
		}
		for p.left = 9; p.left > 0; {
			if p.left == 5 {
				p.compactSoon() // three of the five follow during the compaction
			}
			p.insist(name)
		}
		if run == 1 {
			abandon(p.store) // by a kill, so that the next start compacts
			continue
		}
		err := p.close()
		p.look(name + ", in a stop")
		if left := readFiles(p.t, path); err == nil && len(left) != 1 {
			p.t.Errorf("%s: a stop leaves %q", name, left)
		}
		abandon(p.store)
	}
}

// insist makes a change, again if it is rejected, until the store has healed.
func (p *player) insist(name string) {
	c := p.randomChange()
	err := p.try(c)
	for attempt := 0; err != nil && attempt < 3; attempt++ {
		time.Sleep(2 * time.Second) // until the store has healed, or tried to
		synctest.Wait()
		p.look(name + ", rejected")
		err = p.try(c)
	}
	time.Sleep(time.Second) // until a compaction has ended
	synctest.Wait()
	p.look(name + ", acknowledged")
	if err != nil || p.collecting || p.collected != nil || p.fake.misused || p.journal.broken && !p.failing.Load() {
		p.t.Errorf("%s: does not heal, still collects, writes a broken FILE, or does not tell GET /healthz", name)
	}
}

func (p *player) randomChange() change {
	p.left--
	if len(p.done) == 0 {
		return somebody(1).signUp("a@example.org")
	}
	return randomChange(p.random, modelOf(p.done), func() string {
		p.ids++
		return ideaID(p.ids)
	})
}

// try makes a change and notes it, unless it could not be saved.
func (p *player) try(c change) error {
	p.next = append(slices.Clip(p.done), c)
	err := p.commit(c)
	if !errors.Is(err, errNotSaved) {
		err, p.done = nil, p.next
	} else if !p.failed {
		p.t.Errorf("%s is rejected, but FILE has not failed", inJSON(c))
	}
	p.next = p.done
	return err
}

// step waits until all other goroutines do. Then, while a compaction creates FILE.tmp or writes to it, and does not hold
// fileMu, it makes another change.
func (p *player) step(op, path string, do func() error) error {
	synctest.Wait()
	isTemporary := filepath.Ext(path) == ".tmp" && (op == "create" || op == "write")
	if isTemporary && 1 < p.left && p.left < 5 && p.fileMu.TryLock() {
		p.fileMu.Unlock()
		p.interruptions++
		p.try(p.randomChange()) // only once
	}
	return p.fake.step(op, path, do)
}

// look compares what there is, and what a crash would leave at rest.
func (p *player) look(when string) {
	p.t.Helper()
	want := after(p.done...)
	compare(p.t, when, contents(p.store), want)
	p.lookAt(when, p.fake, 0, want)
}

// lookAt checks what each kind of crash would leave and, if again is 1, what another crash during the next start would.
// What that start has shown must be durable.
func (p *player) lookAt(when string, d *fakeDisk, again int, want ...string) {
	for _, kind := range crashes {
		next, when := d.after(kind), when+", "+kind
		key := fmt.Sprint(next.left(), next.after("a power loss").left(), want, again)
		if p.seen[key] {
			continue
		}
		p.seen[key] = true
		got := next.left().read(p.t, p.paths[again])
		if !slices.Contains(want, got) {
			compare(p.t, when, got, want[0])
		} else if again > 0 {
			next.before = func(op string) {
				p.lookAt(when+", and in the next start before "+op, next, again-1, want...)
			}
			s := mustStart(p.t, p.paths[again], next.step)
			p.lookAt(when+", and after the next start", next, again-1, got)
			next.before = nil
			s.commit(somebody(9).signUp("late@example.org")) // to FILE, whose name must be durable
			p.lookAt(when+", and after a change then", next, again-1, contents(s))
			abandon(s)
		}
	}
}

// A fakeDisk knows what a disk may lose if it is not fsynced: the bytes of a file, and which file has a name.
type fakeDisk struct {
	mu            sync.Mutex
	files         []fakeFile
	live, durable map[string]int  // the index of the file with this name
	before        func(op string) // called before each operation
	inject        disk
	misused       bool // a file was written to after it broke
}

type fakeFile struct {
	synced, written string
	broken          bool // an fsync or a truncation has failed
}

func newFakeDisk() *fakeDisk {
	return &fakeDisk{live: make(map[string]int), durable: make(map[string]int)}
}

// after returns the disk as it is after a crash.
func (d *fakeDisk) after(kind string) *fakeDisk {
	next := &fakeDisk{files: slices.Clone(d.files), live: maps.Clone(d.live), durable: maps.Clone(d.live)}
	switch kind {
	case "a kill": // a later power loss can still lose what was not fsynced
		next.durable = maps.Clone(d.durable)
		return next
	case "a power loss":
		next.live, next.durable = maps.Clone(d.durable), maps.Clone(d.durable)
	}
	for n, f := range d.files {
		rest := f.written[min(len(f.synced), len(f.written)):] // a truncation can be lost, too
		switch half := len(rest) / 2; kind {
		case "a loss of half the bytes":
			rest = rest[:half]
		case "a lost block":
			rest = strings.Repeat("\x00", half) + rest[half:]
		default:
			rest = ""
		}
		next.files[n] = fakeFile{synced: f.synced + rest, written: f.synced + rest}
	}
	return next
}

// left returns the files that there are, whether fsynced or not.
func (d *fakeDisk) left() files {
	f := make(files)
	for name, at := range d.live {
		f[name] = d.files[at].written
	}
	return f
}

func (d *fakeDisk) step(op, path string, do func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := filepath.Base(path)
	if d.before != nil {
		d.before(op + " " + name)
	}
	happened := false // the disk may have done it, even if it says otherwise
	err := d.inject.do(op, path, func() error {
		err := noSync(op, path, do)
		happened = err == nil
		return err
	})
	at, isFile := d.live[name]
	switch {
	case !happened:
	case op == "create":
		d.live[name] = len(d.files)
		d.files = append(d.files, fakeFile{})
	case op == "rename":
		d.live[name] = d.live[name+".tmp"]
		delete(d.live, name+".tmp")
	case !isFile: // the directory is fsynced
		d.durable = maps.Clone(d.live)
	case op == "sync":
		d.files[at].synced = d.files[at].written
	default:
		d.files[at].written = string(must(os.ReadFile(path)))
	}
	if isFile && op == "write" {
		d.misused = d.misused || d.files[at].broken
	} else if isFile && err != nil && op != "rename" {
		d.files[at].broken = true
	}
	return err
}

// TestABrokenFile lets an fsync fail and then the truncation, so FILE keeps a line that was rejected. The store tries
// to heal once a second, and a stop removes the line.
func TestABrokenFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failing, attempts := false, 0
		s := newTestStore(t, func(op, path string, do func() error) error {
			if op == "create" {
				attempts++
			}
			if failing && op != "write" {
				return errInjected
			}
			return noSync(op, path, do)
		})
		s.must(somebody(1).signUp("a@example.org"))
		s.restart()
		var log strings.Builder
		s.logger = slog.New(slog.NewTextHandler(&log, nil))
		before := readFiles(t, s.path)
		failing, attempts = true, 0
		for n := range 6 {
			atOnce(3, func(int) { wantError(t, "a change", s.commit(somebody(1).logOut("", 1)), errNotSaved) })
			wantError(t, "check", s.check(), errNotSaved)
			synctest.Wait()
			compare(t, "the attempts to heal", attempts, 1+n/2)
			time.Sleep(time.Second / 2)
		}
		compare(t, "the errors in the log, the first of a change", strings.Count(log.String(), "level=ERROR"), 1+attempts)
		failing = false
		wantError(t, "a stop", s.close(), nil)
		compare(t, "the files", readFiles(t, s.path), before)
	})
}

// TestAFailedPartOfASnapshot lets the fsync of each part fail. A later one may succeed although the part is lost.
func TestAFailedPartOfASnapshot(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const parts = 5 // of 1,024 changes, and the last one
		syncs, fails := 0, 0
		s := newTestStore(t, func(op, path string, do func() error) error {
			if op == "sync" && filepath.Ext(path) == ".tmp" {
				if syncs++; syncs == fails {
					return errInjected
				}
			}
			return noSync(op, path, do)
		})
		s.must(somebody(1).signUp("a@example.org"))
		for n := range 5000 {
			s.must(somebody(1).create(ideaID(n), "tea", 5))
		}
		for fails = 1; fails <= parts+1; fails++ {
			before := s.file()
			syncs = 0
			s.compactSoon()
			s.must(somebody(1).logOut("", int64(fails)))
			synctest.Wait()
			compare(t, "FILE is kept", strings.HasPrefix(s.file(), before), fails <= parts)
			compare(t, "the files", len(readFiles(t, s.path)), 1)
			compare(t, "the fsyncs, none after one that fails", syncs, min(fails, parts))
			s.survivesAKill("after a compaction")
		}
		s.must(somebody(1).logOut("", 0))
		syncs = 0
		old := s.journal.file
		wantError(t, "a stop", s.close(), nil)
		wantError(t, "the file that was replaced", old.Close(), os.ErrClosed)
		compare(t, "the fsyncs of a stop, which has nobody to make way for", syncs, 1)
	})
}

// TestTheProbeIsTheLargestChange: if there is room for what check writes, there is room for any change.
func TestTheProbeIsTheLargestChange(t *testing.T) {
	s := newTestStore(t, noSync)
	s.failing.Store(true)
	before := len(s.file())
	wantError(t, "check", s.check(), nil)
	s.survivesAKill("after a long line")
	probe := len(s.file()) - before
	id, text := "zzzzzzzzz", strings.Repeat("<", maxContent) // six bytes each
	i := idea{ID: id, Content: text, Impact: 10, Ease: 10, Confidence: 10, Average: 20. / 3, Created: 1e10}
	create := &storedIdea{Owner: id, Idea: i, json: must(json.Marshal(i))}
	u := user{ID: id, Email: strings.Repeat("&", maxEmail), Name: text, Password: dummyHash(defaultCost())}
	first := &session{Key: hashToken(""), UserID: id, Start: 1e10, Expires: 1e10}
	for _, c := range []change{{Create: create}, {Update: create}, {User: &u, Session: first}} {
		if size := len(c.appendJSON(nil)); size > probe {
			t.Errorf("a change may take %d bytes, the probe takes %d", size, probe)
		}
	}
}

// TestKillUnderLoad kills the server under the load of 16 clients, over the same file, and once more in each start.
func TestKillUnderLoad(t *testing.T) {
	rounds := 3
	if *long {
		rounds = 60
	}
	path, users := newLoadUsers(t)
	for range rounds {
		early := startProcess(t, path)
		time.Sleep(rand.N(60 * time.Millisecond))
		early.kill()
		p := startProcess(t, path, "-quiet")
		p.underLoad(t, users, 100+rand.IntN(2000), os.Kill)
		p.w.Close()
		if log := string(must(io.ReadAll(p.log))); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic") {
			t.Error(log)
		}
		checkUsers(t, path, users)
	}
}

// TestTerminateUnderLoad stops the server in the orderly way. If its log has lost its reader, requests go on; if the
// pipe is full, they hang until the stop ends them after a while.
func TestTerminateUnderLoad(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("it has no signals")
	}
	for _, log := range []string{"is quiet", "has no reader", "is full"} {
		if log == "is full" && !*long {
			continue // it takes ten seconds
		}
		path, users := newLoadUsers(t)
		p, writes := startProcess(t, path, fmt.Sprint("-quiet=", log == "is quiet")), 500
		p.waitForURL()
		switch log {
		case "has no reader":
			p.r.Close()
		case "is full":
			p.w.Write(make([]byte, 65_000)) // of 64 KiB: there is room for three requests
			writes = 2
		}
		p.underLoad(t, users, writes, syscall.SIGTERM)
		left := readFiles(t, path)
		if !p.ProcessState.Success() || len(left) != 1 || !json.Valid([]byte(left[dataName])) {
			t.Errorf("its log %s: %s, and the stop leaves %.100q, want one document", log, p.ProcessState, left)
		}
		checkUsers(t, path, users)
	}
}

// TestTerminateAtOnce ends the start with a large FILE, and then, by another signal, a stop that waits for a request.
func TestTerminateAtOnce(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("it has no signals")
	}
	path, ann := scratch(t), somebody(1)
	creates := strings.Repeat(",\n"+inJSON(ann.create(ideaID(1), "tea", 5)), 200_000)
	before := files{dataName: header + inJSON(ann.signUp("a@example.org")) + creates + "]}"}
	before.write(t, path)
	p := startProcess(t, path)
	for _, err := os.Stat(path + ".lock"); err != nil; _, err = os.Stat(path + ".lock") {
		time.Sleep(time.Millisecond) // it is made before FILE is read
	}
	p.Process.Signal(syscall.SIGTERM)
	p.Wait()
	compare(t, "the end of a start", p.ProcessState, "signal: terminated")
	compare(t, "FILE", readFiles(t, path), before)

	p = startProcess(t, scratch(t))
	conn := must(net.Dial("tcp", strings.TrimPrefix(p.waitForURL(), "http://")))
	defer conn.Close()
	conn.Write([]byte("GET /healthz")) // and no more
	go func() {
		for p.Process.Signal(syscall.SIGTERM) == nil {
			time.Sleep(10 * time.Millisecond)
		}
	}()
	p.Wait()
	compare(t, "the end of a stop", p.ProcessState, "signal: terminated")
}

// TestLogoutSurvivesAKill logs in again in the second of the old login: the new token could equal the old one.
func TestLogoutSurvivesAKill(t *testing.T) {
	path := scratch(t)
	p := startProcess(t, path)
	body, _ := p.send(t, 201, "", "POST /users", jacksSignUp)
	for range 3 {
		old, refresh := member(body, "jwt"), `{"refresh_token":"`+member(body, "refresh_token")+`"}`
		p.send(t, 204, old, "DELETE /access-tokens", refresh)
		p.kill()
		p = startProcess(t, path)
		p.send(t, 401, old, "GET /me", "")
		p.send(t, 400, "", "POST /access-tokens/refresh", refresh)
		body, _ = p.send(t, 201, "", "POST /access-tokens", jacksLogin)
		p.send(t, 200, member(body, "jwt"), "GET /me", "")
	}
}

// TestAPanicEndsTheProcess: a panic in apply must end the process, as memory may be half changed.
func TestAPanicEndsTheProcess(t *testing.T) {
	if path := os.Getenv(panicEnv); path != "" {
		defer func() { recover() }() // as net/http would
		s := must(openStore(path, nil, quiet))
		must(s, s.start()).accounts = nil
		s.commit(somebody(1).signUp("a@example.org"))
		return
	}
	path := scratch(t)
	command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.timeout=20s") // if it hangs instead
	command.Env = append(os.Environ(), panicEnv+"="+path)
	output, err := command.CombinedOutput()
	if command.ProcessState.ExitCode() != 2 || !strings.Contains(string(output), "assignment to entry in nil map") {
		t.Errorf("got %v, want status 2:\n%s", err, output)
	}
	compare(t, "the next start", readFiles(t, path).read(t, path), after(somebody(1).signUp("a@example.org")))
}

// Helpers:

const dataName = "pool.json"
const header = `{"format":2,"last_id":"0","changes":[` + "\n" // begins a FILE, and is followed by changes
var checksum = regexp.MustCompile(`,"crc32c":"\w+"`)
var errInjected = errors.New("injected")
var quiet = slog.New(slog.DiscardHandler)

// A person is a user's id. Its methods return changes of this user.
type person string

func somebody(n int) person { return person(fmt.Sprintf("user%05d", n)) }

func ideaID(n int) string { return fmt.Sprintf("idea%05d", n) }

func (p person) signUp(email string) change {
	u := user{ID: string(p), Email: email, Name: "Any Name", Password: "hash"}
	return change{User: &u, Session: p.logIn(string(p)+"-0", 1).Session}
}

func (p person) logIn(key string, second int64) change {
	return change{Session: &session{Key: key, UserID: string(p), Start: second, Expires: second + 100}}
}

// logOut ends an access token that expires so many seconds after the year 2100 has begun.
func (p person) logOut(key string, seconds int64) change {
	return change{Logout: &logout{tokenID: tokenID{string(p), 4_102_444_800 + seconds}, Key: key}}
}

func (p person) create(id, content string, impact int) change {
	i := idea{ID: id, Content: content, Impact: impact, Ease: 5, Confidence: 5, Created: 1_600_000_000}
	stored := &storedIdea{Owner: string(p), Idea: i}
	return change{Create: must(stored, stored.encode())}
}

func (p person) update(id, content string, impact int) change {
	return change{Update: p.create(id, content, impact).Create}
}

func (p person) remove(id string) change { return change{Delete: &ideaKey{string(p), id}} }

// randomChange may have to be rejected: its idea may be somebody else's or gone, or its e-mail may be taken.
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

func inJSON(c change) string { return string(must(json.Marshal(c))) }

// A model holds what was acknowledged, by user id.
type model map[string]*belongings

type belongings struct {
	user      user
	sessions  []session      // oldest first
	ideas     []*storedIdea  // as listed
	loggedOut map[int64]bool // by the second in which the access token expires
	lastLogin int64
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
		mine.lastLogin = c.Session.Start
		mine.sessions = slices.DeleteFunc(mine.sessions, func(s session) bool { return s.Expires <= c.Session.Start })
		mine.sessions = append(mine.sessions[max(0, len(mine.sessions)-99):], *c.Session)
	case c.Logout != nil:
		mine := m[c.Logout.UserID]
		mine.sessions = slices.DeleteFunc(mine.sessions, func(s session) bool { return s.Key == c.Logout.Key })
		mine.loggedOut[c.Logout.Expires] = true
	case c.Create != nil:
		mine := m[c.Create.Owner]
		at, _ := slices.BinarySearchFunc(mine.ideas, c.Create, func(a, b *storedIdea) int {
			return -cmp.Or(cmp.Compare(a.Idea.Average, b.Idea.Average), cmp.Compare(a.Idea.ID, b.Idea.ID))
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
	m, found := make(model), len(s.emails)+len(s.sessions)+len(s.ideas)+len(s.loggedOut)
	for id, a := range s.accounts {
		mine := &belongings{loggedOut: make(map[int64]bool)}
		m[id] = mine
		mine.user, _ = s.userByEmail(strings.ToUpper(a.user.Email))
		for _, theirs := range a.sessions {
			session, _, _ := s.session(theirs.Key)
			mine.sessions = append(mine.sessions, session)
		}
		for _, listed := range pages(s, id) {
			if i, err := s.idea(ideaKey{id, listed[len(`{"id":"`):][:9]}); err == nil && string(i.json) == listed {
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

func pages(s *store, owner string) (all []string) {
	for page := 1; ; page++ {
		list, total := s.pageOfIdeas(owner, page)
		var ideas []json.RawMessage
		err := json.Unmarshal(list, &ideas)
		for _, i := range must(ideas, err) {
			all = append(all, string(i))
		}
		if page*pageSize >= total {
			return all
		}
	}
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

// A testStore is a store and the model of it.
type testStore struct {
	*store
	t       testing.TB
	scratch string // the path of a copy of FILE
	modelMu sync.Mutex
	model   model
}

func newTestStore(t testing.TB, disk disk) *testStore {
	t.Helper()
	return &testStore{store: mustStart(t, scratch(t), disk), t: t, scratch: scratch(t), model: make(model)}
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

// commitInOneLine makes several changes in one commit.
func (s *testStore) commitInOneLine(changes ...change) {
	var queue []*pendingChange
	for _, c := range changes {
		queue = append(queue, &pendingChange{c, c.appendJSON(nil), make(chan error, 1)})
		s.model.do(c)
	}
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	s.finish(queue, s.write(queue))
}

// survivesAKill compares what there is, and what a new store makes of FILE, with the model.
func (s *testStore) survivesAKill(when string) {
	s.t.Helper()
	compare(s.t, when, contents(s.store), s.model.String())
	compare(s.t, when+", then a kill", readFiles(s.t, s.path).read(s.t, s.scratch), s.model.String())
}

func (s *testStore) restart() {
	s.t.Helper()
	wantError(s.t, "a stop", s.close(), nil)
	abandon(s.store)
	s.store = mustStart(s.t, s.path, s.disk)
}

func (s *testStore) file() string { return string(must(os.ReadFile(s.path))) }

// compactSoon lets the next change cause a compaction.
func (s *store) compactSoon() {
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	s.journal.count, s.lastCompaction = 1<<30, time.Time{}
}

// abandon leaves FILE as it is, as the end of a process would.
func abandon(s *store) {
	s.fileMu.Lock()
	closed := s.closed
	s.closed = true
	s.fileMu.Unlock()
	if !closed {
		s.compacting.Lock() // and nobody else from now on
	}
	s.release()
}

// mustOpen opens a store that is abandoned at the end of the test.
func mustOpen(t testing.TB, path string, disk disk) *store {
	t.Helper()
	s, err := openStore(path, disk, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { abandon(s) })
	return s
}

func mustStart(t testing.TB, path string, disk disk) *store {
	t.Helper()
	s := mustOpen(t, path, disk)
	wantError(t, "a start", s.start(), nil)
	return s
}

func atOnce(n int, do func(n int)) {
	var wg sync.WaitGroup
	for n := range n {
		wg.Go(func() { do(n) })
	}
	wg.Wait()
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
		must(openStore(s.path, nil, quiet)).release()
	}
}

// noSync skips the fsync in tests that are not about it.
func noSync(op, _ string, do func() error) error {
	if op == "sync" {
		return nil
	}
	return do()
}

// halfWrite writes only half, as when the disk becomes full.
func halfWrite(path string, do func() error) error {
	before := must(os.Stat(path)).Size()
	if err := do(); err != nil {
		return err
	}
	os.Truncate(path, (before+must(os.Stat(path)).Size())/2)
	return syscall.ENOSPC
}

// scratch is the path of a FILE in a directory of its own.
func scratch(t testing.TB) string { return filepath.Join(t.TempDir(), dataName) }

// files are the contents of FILE and FILE.tmp, by name.
type files map[string]string

func readFiles(t testing.TB, path string) files {
	t.Helper()
	f := make(files)
	for _, path := range []string{path, path + ".tmp"} {
		if data, err := os.ReadFile(path); !errors.Is(err, os.ErrNotExist) {
			f[filepath.Base(path)] = string(must(data, err))
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
		file := must(os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600))
		_, err := file.WriteString(data)
		wantError(t, path, errors.Join(err, file.Truncate(int64(len(data))), file.Close()), nil)
	}
}

// read returns what a store makes of the files, at a path: its contents in lines, or an error.
func (f files) read(t testing.TB, path string) string {
	t.Helper()
	f.write(t, path)
	s, err := openStore(path, nil, quiet)
	if err != nil {
		return err.Error()
	}
	defer s.release()
	return contents(s)
}

// rejected wants an error of one line that contains text when a store opens the files, and the files as they are.
func (f files) rejected(t *testing.T, path, name, text string) {
	t.Helper()
	if got := f.read(t, path); got == "" || !strings.Contains(got, text) || strings.Contains(got, "\n") {
		t.Errorf("%s: got %q, want an error of one line with %q", name, got, text)
	}
	compare(t, name+", the files", readFiles(t, path), f)
}

// example returns a FILE, value by value, and what there is after the snapshot and after each later line.
func example(t *testing.T, more ...change) (values, states []string) {
	s := newTestStore(t, noSync)
	ann, bob := somebody(1), somebody(2)
	s.must(ann.signUp("a@example.org"), bob.signUp("b@example.org"))
	s.must(ann.create(ideaID(1), "tea", 5), bob.create(ideaID(2), "rain & wind", 6), ann.logOut("", 0))
	s.must(more...)
	s.restart()
	for _, line := range [][]change{
		{},
		{ann.create(ideaID(3), "scones", 7)},
		{bob.logIn("key", 10), ann.remove(ideaID(3))},
		{bob.update(ideaID(2), "snow", 8), bob.logOut("key", 1)},
		{bob.remove(ideaID(2)), somebody(3).signUp("c@example.org")},
	} {
		s.commitInOneLine(line...)
		states = append(states, contents(s.store))
	}
	return regexp.MustCompile(`(?s).*?"crc32c":"\w{8}"}\n`).FindAllString(s.file(), -1), states
}

// laterLine is a line that follows the snapshot, without its checksum.
func laterLine(c change) string { return `{"changes":[` + inJSON(c) + "]" }

// withChecksums makes a FILE of values, each without its checksum and last brace.
func withChecksums(values ...string) string {
	var file strings.Builder
	sum, castagnoli := uint32(0), crc32.MakeTable(crc32.Castagnoli)
	for _, value := range values {
		sum = crc32.Update(sum, castagnoli, []byte(value))
		fmt.Fprintf(&file, "%s,\"crc32c\":\"%08x\"}\n", value, sum)
	}
	return file.String()
}

const serveEnv, panicEnv = "IDEAPOOL_TEST_SERVE", "IDEAPOOL_TEST_PANIC"

// TestMain lets the test binary be the server, for the tests that kill it.
func TestMain(m *testing.M) {
	if os.Getenv(serveEnv) == "" {
		os.Exit(m.Run())
	}
	main()
}

// A process is the server in a process of its own.
type process struct {
	*exec.Cmd
	r, w       *os.File // its stderr
	log        *bufio.Reader
	waitForURL func() string
}

func startProcess(t *testing.T, path string, flags ...string) *process {
	writeFile(t, path+".pem", pemText("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(rfcKey())))) // making one is slow
	r, w, err := os.Pipe()
	flags = append(flags, "-addr", "127.0.0.1:0", "-data", path, "-key", path+".pem")
	p := &process{Cmd: exec.Command(os.Args[0], flags...), r: r, w: w, log: bufio.NewReader(r)}
	p.waitForURL = sync.OnceValue(func() (url string) {
		for url == "" {
			url = regexp.MustCompile(`http://127.*|$`).FindString(must(p.log.ReadString('\n')))
		}
		return url
	})
	p.Env, p.Stderr = append(os.Environ(), serveEnv+"=1"), w
	t.Cleanup(must(p, cmp.Or(err, p.Start())).kill)
	return p
}

func (p *process) kill() {
	p.Process.Kill() // fails if it has exited
	p.Wait()
	p.r.Close()
	p.w.Close()
}

// send returns the body of a response, if all of it arrives.
func (p *process) send(t *testing.T, status int, access, request, body string) (response string, ok bool) {
	t.Helper()
	method, path, _ := strings.Cut(request, " ")
	r := must(http.NewRequestWithContext(t.Context(), method, p.waitForURL()+path, strings.NewReader(body)))
	r.Header.Set("X-Access-Token", access)
	got, err := httpClient.Do(r)
	if err != nil {
		return "", false
	}
	defer got.Body.Close()
	data, err := io.ReadAll(got.Body)
	if err == nil && got.StatusCode != status {
		t.Errorf("%s: got %d, want %d: %s", request, got.StatusCode, status, data)
	}
	return string(data), err == nil && got.StatusCode == status
}

// httpClient gives up when the connection of a killed server stays open, as happens under Wine.
var httpClient = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}, Timeout: 20 * time.Second}

// member returns a string member of a JSON object.
func member(object, name string) string {
	var members map[string]any
	json.Unmarshal([]byte(object), &members)
	text, _ := members[name].(string)
	return text
}

// symlink fails on Windows, where not everybody may create links.
func symlink(target, path string) error {
	if runtime.GOOS == "windows" {
		return errors.ErrUnsupported
	}
	return os.Symlink(target, path)
}

// underLoad has 16 clients at work until, after so many acknowledged writes, the server gets a signal.
func (p *process) underLoad(t *testing.T, users []*loadUser, writes int, end os.Signal) {
	var acknowledged atomic.Int64
	atOnce(16, func(n int) {
		for users[n+16*rand.IntN(len(users)/16)].change(t, p) {
			if acknowledged.Add(1) == int64(writes) {
				time.AfterFunc(rand.N(3*time.Millisecond), func() { p.Process.Signal(end) })
			}
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	p.Wait() // how it ended is in its ProcessState
}

// A loadUser has at most one idea.
type loadUser struct {
	id, access string
	idea       string // the last response: JSON, or nothing after a delete
	underWay   string // a part of the JSON after a change that had no response, or nothing after such a delete
}

// newLoadUsers makes 128 users, and a FILE that knows them, so that no hashes need to be computed first.
func newLoadUsers(t *testing.T) (path string, users []*loadUser) {
	s, tokens := newTestStore(t, noSync), newTokens(rfcKey())
	for n := range 128 {
		p := person(s.newID())
		s.must(p.signUp(fmt.Sprintf("%d@example.org", n)))
		users = append(users, &loadUser{id: string(p), access: must(tokens.sign(claims{UserID: string(p), Expires: 1e10}))})
	}
	abandon(s.store)
	return s.path, users
}

// change creates, updates or deletes the idea. It returns false if there is no response.
func (u *loadUser) change(t *testing.T, p *process) bool {
	request, status := "POST /ideas", 201
	u.underWay = fmt.Sprintf(`"content":"%d","impact":5,"ease":5,"confidence":5`, rand.Uint64())
	if u.idea != "" {
		request, status = "PUT /ideas/"+member(u.idea, "id"), 200
	}
	if u.idea != "" && rand.IntN(2) == 0 {
		request, status, u.underWay = "DELETE /ideas/"+member(u.idea, "id"), 204, ""
	}
	response, ok := p.send(t, status, u.access, request, "{"+u.underWay+"}")
	if ok {
		u.idea, u.underWay = response, response
	}
	return ok
}

// checkUsers compares what there is with the responses. A change without one may have happened or not.
func checkUsers(t *testing.T, path string, users []*loadUser) {
	t.Helper()
	s := mustOpen(t, path, nil)
	defer abandon(s)
	for _, u := range users {
		ideas := pages(s, u.id)
		got := strings.Join(ideas, " ")
		happened := len(ideas) < 2 && strings.Contains(got, u.underWay) && (got == "") == (u.underWay == "")
		if got != u.idea && !happened {
			t.Errorf("got the ideas %q, want %q, or with %q", got, u.idea, u.underWay)
		}
		u.idea, u.underWay = got, got
	}
}
