// A DQM agent: fills a histogram and sends it to the DQM receiver until the receiver has acknowledged it.
//   g++ -std=c++17 -O2 dqm_agent.cpp -o dqm_agent -lcurl                                       sends a file
//   g++ -DWITH_ROOT -O2 dqm_agent.cpp -o dqm_agent $(root-config --cflags --libs) -lcurl       sends from memory, too
//   ./dqm_agent https://dqm.example.org/rest/api/files token_file 300005 EMC 1448384650 [hists.root]
#include <curl/curl.h>
#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>
#ifdef WITH_ROOT
#include <TH1F.h>
#include <TMemFile.h>
#endif

static size_t append(char *data, size_t, size_t size, void *answer) {
   static_cast<std::string *>(answer)->append(data, size);
   return size;
}

// Returns true once the receiver has stored the file, false if it refused the file or all tries failed.
bool send(const std::string &url, const std::vector<std::string> &headers, const std::vector<char> &file) {
   CURL *curl = curl_easy_init();
   curl_slist *list = nullptr;
   for (const auto &header : headers) list = curl_slist_append(list, header.c_str());
   curl_easy_setopt(curl, CURLOPT_URL, url.c_str());
   curl_easy_setopt(curl, CURLOPT_HTTPHEADER, list);
   curl_easy_setopt(curl, CURLOPT_POSTFIELDS, file.data());
   curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(file.size()));
   curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, append);
   curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);          // the agent may have threads
   curl_easy_setopt(curl, CURLOPT_LOW_SPEED_LIMIT, 1L);   // bytes per second: give up below that …
   curl_easy_setopt(curl, CURLOPT_LOW_SPEED_TIME, 120L);  // … after so many seconds
   bool stored = false, again = true;
   for (int attempt = 0; again && attempt < 10; ++attempt) {
      if (attempt) std::this_thread::sleep_for(std::chrono::seconds(std::min(1 << (attempt - 1), 60)));
      std::string answer;
      long status = 0;  // no answer
      curl_easy_setopt(curl, CURLOPT_WRITEDATA, &answer);
      const CURLcode error = curl_easy_perform(curl);
      if (!error) curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
      // A proxy's own 200 does not name the size. A 400 may be sent again only if the body was cut on its way.
      stored = status == 200 && answer.find("\"size\": " + std::to_string(file.size()) + ",") != std::string::npos;
      const bool cut = status == 400 && answer.find("The body ended") != std::string::npos;
      again = !stored && (cut || status < 300 || status == 408 || status == 429 || status >= 500);
      std::cerr << "dqm_agent: " << status << ' ' << (error ? curl_easy_strerror(error) : answer) << '\n';
   }
   curl_slist_free_all(list);
   curl_easy_cleanup(curl);
   return stored;
}

int main(int count, char **arguments) {
   std::vector<char> file;
   std::string token;
   if (count > 5) std::ifstream(arguments[2]) >> token;  // not an argument: all users can list those
   if (count > 6) {
      std::ifstream stream(arguments[6], std::ios::binary);
      file.assign(std::istreambuf_iterator<char>(stream), {});
   }
#ifdef WITH_ROOT
   if (count == 6) {
      TMemFile memory("hists.root", "RECREATE");
      TH1F hPt("hPt", "Transverse momentum;p_{T} (GeV/c);tracks", 100, -5, 5);  // belongs to the file from here on
      hPt.FillRandom("gaus", 1000);
      memory.Write();                // objects, key list, header: without it the file is not complete
      file.resize(memory.GetEND());  // not GetSize(), the size of the buffer: 2 MiB for one histogram
      memory.CopyTo(file.data(), file.size());
   }
#endif
   if (file.empty() || token.empty()) {
      std::cerr << "usage: dqm_agent URL TOKEN_FILE RUN AGENT UNIX_SECONDS [FILE]\n";
      return 2;
   }
   curl_global_init(CURL_GLOBAL_DEFAULT);
   const std::string run = arguments[3], agent = arguments[4], time = arguments[5];
   const bool stored = send(arguments[1], {"token: " + token, "runNumber: " + run, "amoreAgent: " + agent,
                            "timeStamp: " + time, "Content-Type: application/octet-stream"}, file);
   return stored ? 0 : 1;
}
